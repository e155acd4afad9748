"""Makes `pkg://jdistill.conf` usable as a Hydra search path."""

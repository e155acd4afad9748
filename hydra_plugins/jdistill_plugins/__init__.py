"""The Hydra plug-ins of jdistill."""

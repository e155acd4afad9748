"""Where the units of a sweep are carried out: in this process, in processes, on a cluster."""

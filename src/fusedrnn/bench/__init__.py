"""The command `fusedrnn bench` times our kernels and the installed peers in one run."""

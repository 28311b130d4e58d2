"""The command `fusedrnn bench`: our kernels and the installed peers, timed alternately in one run."""

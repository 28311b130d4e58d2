"""The command `fusedrnn bench`: ours against the installed peers, by turns in one run."""

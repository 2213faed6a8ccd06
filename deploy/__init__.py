"""Runs Foldline: the embedded engines, the databases and their roles, the processes, `dev` and `demo`."""

"""The whole system on one machine, as child processes."""

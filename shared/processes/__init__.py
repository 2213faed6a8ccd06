"""The engine of the third fold: from the line to the commands and timers of processes."""

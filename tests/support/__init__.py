"""What tests of several kinds use: real engines, databases to spoil, waiting, and the running processes."""

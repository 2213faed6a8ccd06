"""The running system: engines, processes, and waiting for them."""

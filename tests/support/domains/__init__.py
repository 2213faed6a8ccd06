"""Small domains to try the kernel with."""

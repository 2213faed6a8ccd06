"""The `foldline` command: a client of the services' APIs, nothing more."""

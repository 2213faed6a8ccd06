"""gRPC in and out: the server and its behaviours, statuses, validation, pages, channels."""

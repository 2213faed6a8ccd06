"""The line of events and its readers: the event store, the relay, the broker, followers and their checkpoints."""

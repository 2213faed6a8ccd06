"""The engine of the first fold: from a command to events on the line."""

"""The read service: query tables that follow the line of events, and the RPCs that ask them."""

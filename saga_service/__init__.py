"""The saga service: processes that send commands, and what operators can see of them and tell them."""

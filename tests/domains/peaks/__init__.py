"""A summary of the bank's accounts that only tests have: its `.proto`, its projection file and its row of the registry."""

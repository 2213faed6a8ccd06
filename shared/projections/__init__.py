"""The engine of the second fold: from the line to the rows of query tables."""

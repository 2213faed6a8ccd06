"""The query tables, one file each: rows, folds, and which event goes to which fold."""

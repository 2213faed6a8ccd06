"""A subscriber of another team: it keeps totals of deposits, exactly once, from Foldline's public events."""

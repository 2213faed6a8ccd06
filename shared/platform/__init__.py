"""What every process needs before it serves anything: settings, logs, identity, database connections."""

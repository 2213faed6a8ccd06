"""Runs the read database's history; see shared/migrate.py."""

from shared.migrate import run_in_env

run_in_env()

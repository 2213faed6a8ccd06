"""Runs the write database's history; see shared/platform/migrate.py."""

from shared.platform.migrate import run_in_env

run_in_env()

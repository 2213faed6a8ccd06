"""Callers of the public API."""

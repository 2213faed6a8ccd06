"""Doubles of peer services, and controls that must fail."""

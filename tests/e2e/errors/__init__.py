"""The rows of the error table (tests/e2e/test_error_table.py)."""

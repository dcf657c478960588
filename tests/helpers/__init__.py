"""Common code of the test files."""

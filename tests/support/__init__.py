"""Helpers shared by all tests; pytest's `pythonpath` makes this folder importable as `support`."""

"""Accidents rehearsed by the hundred: `python -m tests.rehearsal --help`."""

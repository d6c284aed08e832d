"""Chaos: the whole service under random faults, watched by an independent observer. `python -m tests.chaos --help`."""

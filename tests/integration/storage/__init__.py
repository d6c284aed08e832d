"""The two kinds of storage."""

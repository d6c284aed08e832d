"""Image files: opening those that callers send, and writing those that are generated. Needs no torch."""

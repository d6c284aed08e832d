"""The worker: painting, ending, leaving, and the clock."""

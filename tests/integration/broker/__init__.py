"""The doorbell, and a cable to pull."""

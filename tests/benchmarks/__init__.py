"""Measurements. Each file answers one question; dated results are in LOG.md."""

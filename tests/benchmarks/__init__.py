"""Measurements. One file asks one question; dated results are in LOG.md."""

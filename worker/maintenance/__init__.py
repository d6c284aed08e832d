"""Periodic maintenance: repairs the effects of crashes and outages, and deletes expired data."""

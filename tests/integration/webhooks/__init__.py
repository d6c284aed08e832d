"""Telling callers, and whom never to tell."""

"""Tests of both kinds of storage."""

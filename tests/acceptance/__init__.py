"""Tests of whole installations: real processes and real services."""

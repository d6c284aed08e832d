"""Tests on real PostgreSQL, Redis and S3."""

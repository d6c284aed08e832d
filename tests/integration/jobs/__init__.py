"""The job record, on SQLite and PostgreSQL."""

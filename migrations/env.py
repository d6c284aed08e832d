"""Alembic environment: migrates the database that the settings name.

The URL comes from `-x url=...`, which tests use, else from the settings.
"""

import os

from alembic import context

from zcore.jobs.database import Database
from zcore.jobs.models import Table
from zcore.settings import load_settings


def run() -> None:
    """Apply the revisions over one connection; on SQLite, tables are rebuilt if they cannot be altered."""
    url = context.get_x_argument(as_dictionary=True).get("url") or load_settings(os.environ).database_url
    database = Database(url, limits=None)  # rewriting a large table takes its time
    with database.engine.connect() as connection:
        if connection.dialect.name == "sqlite":
            # Dropping a table that is rebuilt would delete every row that refers to it. Has no effect in a transaction.
            connection.connection.cursor().execute("PRAGMA foreign_keys = OFF")
        context.configure(
            connection=connection,
            target_metadata=Table.metadata,
            render_as_batch=connection.dialect.name == "sqlite",
            compare_type=True,
        )
        with context.begin_transaction():
            context.run_migrations()
        connection.commit()
    database.close()


run()

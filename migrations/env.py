"""Alembic's entry: brings the database of this process's settings to the newest revision.

Takes the URL from the settings (ZIMAGE_DATABASE__URL above the file), or from `-x url=...`, which tests use.
"""

import os

from alembic import context

from zcore.jobs.database import Database
from zcore.jobs.models import Table
from zcore.settings import load_settings


def run() -> None:
    """Applies revisions over one connection; on SQLite tables are rebuilt where it cannot alter them."""
    url = context.get_x_argument(as_dictionary=True).get("url") or load_settings(os.environ).database_url
    database = Database(url)
    with database.engine.connect() as connection:
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

"""The database and the objects of an installation, read past every link: on servers, or in one folder."""

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psycopg

from tests.services.s3 import Bucket

Rows = list[tuple[Any, ...]]
UNAVAILABLE = (psycopg.Error, sqlite3.Error)
"""What reading raises while the database is away."""


class Store(Protocol):
    """What is stored. Ids are UUIDs or their hexadecimal digits, as the database has them."""

    def rows(self, query: str) -> Rows:
        """Return the rows of a query that both databases understand."""
        ...

    def execute(self, statement: str) -> None:
        """Change the database."""
        ...

    def keys(self) -> set[str]:
        """Return the key of every object."""
        ...

    def content(self, key: str) -> bytes:
        """Return an object."""
        ...


@dataclass(frozen=True)
class ServerStore:
    """PostgreSQL at an address for psycopg, and a bucket."""

    address: str
    bucket: Bucket

    def rows(self, query: str) -> Rows:
        """Return the rows of a query."""
        with psycopg.connect(self.address, connect_timeout=5, options="-c statement_timeout=10s") as connection:
            return connection.execute(query.encode()).fetchall()

    def execute(self, statement: str) -> None:
        """Change the database."""
        with psycopg.connect(self.address, connect_timeout=5) as connection:
            connection.execute(statement.encode())

    def keys(self) -> set[str]:
        """Return the key of every object."""
        with self.bucket.client() as client:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket.name)
            return {found["Key"] for page in pages for found in page.get("Contents", []) if "Key" in found}

    def content(self, key: str) -> bytes:
        """Return an object."""
        with self.bucket.client() as client:
            return client.get_object(Bucket=self.bucket.name, Key=key)["Body"].read()


@dataclass(frozen=True)
class FolderStore:
    """SQLite and the folder of images in one data folder."""

    folder: Path

    def rows(self, query: str) -> Rows:
        """Return the rows of a query."""
        with closing(self._connected()) as connection:
            return connection.execute(query).fetchall()

    def execute(self, statement: str) -> None:
        """Change the database."""
        with closing(self._connected()) as connection, connection:
            connection.execute(statement)

    def keys(self) -> set[str]:
        """Return the key of every object, half-written files included."""
        storage = self.folder / "storage"
        return {str(path.relative_to(storage)) for path in storage.rglob("*") if path.is_file()}

    def content(self, key: str) -> bytes:
        """Return an object."""
        return (self.folder / "storage" / key).read_bytes()

    def _connected(self) -> sqlite3.Connection:
        return sqlite3.connect(self.folder / "zimage.db", timeout=30)

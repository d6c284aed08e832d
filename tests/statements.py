"""Count what a process asks of its database."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import event

from zcore.jobs.database import Database


@dataclass
class Asked:
    """The statements of some transactions in order, and how many of these began and committed."""

    statements: list[str] = field(default_factory=list[str])
    begun: int = 0
    committed: int = 0


@contextmanager
def counted(*databases: Database) -> Generator[Asked]:
    """Count what these databases are asked during the block; BEGIN and COMMIT are no statements."""
    asked = Asked()

    def remember(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "BEGIN" not in statement:  # on SQLite it comes as a statement
            asked.statements.append(statement)

    def begin(_connection: Any) -> None:
        asked.begun += 1

    def commit(_connection: Any) -> None:
        asked.committed += 1

    listeners = {"before_cursor_execute": remember, "begin": begin, "commit": commit}
    for database in databases:
        for name, listener in listeners.items():
            event.listen(database.engine, name, listener)
    try:
        yield asked
    finally:
        for database in databases:
            for name, listener in listeners.items():
                event.remove(database.engine, name, listener)

"""CPU time of this thread and of PostgreSQL's processes. On a busy machine it says more than the time of a clock."""

import time
from pathlib import Path

from zcore.jobs.database import Database


def server_ms(*process_ids: int) -> float:
    """Return how many milliseconds these processes have run so far."""
    return sum(int(Path(f"/proc/{each}/schedstat").read_text().split()[0]) for each in process_ids) / 1e6


def client_ms() -> float:
    """Return how many milliseconds this thread has run so far."""
    return 1000 * time.thread_time()


def processes_of(database: Database) -> list[int]:
    """Return the processes of the server, which runs on this machine: those that serve connections, and its own."""
    with database.engine.connect() as connection:
        return list(connection.exec_driver_sql("SELECT pid FROM pg_stat_activity").scalars())

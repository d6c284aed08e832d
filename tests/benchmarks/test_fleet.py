"""How many jobs a second can one database serve to 1,000 workers?

Method: a simulated fleet against a real PostgreSQL. Each worker claims a job, works on it for as long as the goal
allows (1,000 workers / 300 jobs a second), renews its lease meanwhile as a worker does, completes the job with one
image and claims the next. The workers are entries of a schedule, whose database calls run on 16 threads and as many
connections, all on the two cores of this machine together with PostgreSQL. The queue is filled before. Measured after a
warm-up, from the completions, and from the WAL and the transactions that PostgreSQL counts. Goal: 300 jobs a second.
"""

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from tests.benchmarks.report import report, spread
from tests.benchmarks.test_claims import fill
from tests.services.postgres import Postgres
from zcore.jobs import claims, lifecycle
from zcore.jobs.claims import Lease
from zcore.jobs.database import Database

pytestmark = pytest.mark.benchmarks

WORKERS = 1000
GOAL_PER_S = 300
THREADS = 16
LEASE_S = 30.0
WARM_UP_S = 10.0
MEASURED_S = 40.0
MARKS_INTERVAL_S = 15.0
COUNTERS = """
SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint,
       pg_snapshot_xmax(pg_current_snapshot())::text::bigint
"""


@pytest.fixture
def database(postgres: Postgres, migrated_template: str) -> Iterator[Database]:
    with postgres.database(migrated_template) as url, closing(Database(url, pool_size=THREADS)) as opened:
        yield opened


class Fleet:
    """The schedule: who does what next, and when (monotonic seconds)."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._order = itertools.count()
        self._changed = threading.Condition()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self.ended_at: list[float] = []
        self.claim_ms: list[float] = []
        now = time.monotonic()
        for number in range(WORKERS):
            self._at(now + number / GOAL_PER_S, lambda name=f"worker-{number}": self._claim(name))
        self._at(now, self._move_marks)

    def run(self, until: float) -> None:
        """Do what is due, until the time is over."""
        with ThreadPoolExecutor(THREADS) as threads:
            for ended in [threads.submit(self._work, until) for _ in range(THREADS)]:
                ended.result()

    def _work(self, until: float) -> None:
        while (now := time.monotonic()) < until:
            with self._changed:
                if not self._due or self._due[0][0] > now:
                    self._changed.wait(min(until, self._due[0][0] if self._due else until) - now)
                    continue
                action = heapq.heappop(self._due)[2]
            action()

    def _at(self, moment: float, action: Callable[[], None]) -> None:
        with self._changed:
            heapq.heappush(self._due, (moment, next(self._order), action))
            self._changed.notify()

    def _claim(self, name: str) -> None:
        started = time.monotonic()
        with self._database.write() as transaction:
            job = claims.claim(transaction, name, LEASE_S)
        self.claim_ms.append(1000 * (time.monotonic() - started))
        assert job is not None, "the queue is long enough"
        lease, end = claims.lease_of(job), time.monotonic() + WORKERS / GOAL_PER_S
        self._at(end - 1, lambda: self._renew(lease))
        self._at(end, lambda: self._complete(name, lease))

    def _renew(self, lease: Lease) -> None:
        with self._database.write() as transaction:
            assert claims.heartbeat(transaction, lease, LEASE_S, ("denoise", 5, 8)) is not None

    def _complete(self, name: str, lease: Lease) -> None:
        image = lifecycle.StoredOutput(0, f"jobs/{lease.job_id}/1-0.png", "png", 1024, 1024, 1_543_210, "a" * 64, 7)
        with self._database.write() as transaction:
            assert lifecycle.complete(transaction, lease, [image], {"total_ms": 3300}, {"device": "gpu"}, 86_400)
        self.ended_at.append(time.monotonic())
        self._claim(name)

    def _move_marks(self) -> None:
        with self._database.write() as transaction:
            claims.advance_marks(transaction)
        self._at(time.monotonic() + MARKS_INTERVAL_S, self._move_marks)


def test_fleet(database: Database) -> None:
    fill(database, int(GOAL_PER_S * (WARM_UP_S + MEASURED_S) * 1.5))
    fleet, started = Fleet(database), time.monotonic()
    fleet.run(started + WARM_UP_S)
    ended, claimed, before, begun = len(fleet.ended_at), len(fleet.claim_ms), _counters(database), time.monotonic()
    fleet.run(begun + MEASURED_S)
    seconds, after = time.monotonic() - begun, _counters(database)
    jobs = len(fleet.ended_at) - ended
    report(
        f"a fleet of {WORKERS} workers",
        jobs_per_s=round(jobs / seconds, 1),
        goal_per_s=GOAL_PER_S,
        claim_ms=spread(fleet.claim_ms[claimed:]),
        wal_bytes_per_job=round((after[0] - before[0]) / jobs),
        transactions_per_job=round((after[1] - before[1]) / jobs, 2),
    )


def _counters(database: Database) -> tuple[int, int]:
    with database.engine.connect() as connection:
        wal_bytes, transactions = connection.exec_driver_sql(COUNTERS).one()
        return int(wal_bytes), int(transactions)

"""How many jobs a second can one database serve to 1,000 workers?

Method: a simulated fleet against a real PostgreSQL. Each worker claims a job, works on it for as long as the goal
allows (1,000 workers / 300 jobs a second), renews its lease meanwhile as a worker does, completes the job with one
image and claims the next. The workers are entries of a schedule in each of two processes, whose database calls run on
8 threads and as many connections, all on the two cores of this machine together with PostgreSQL. The queue is filled
before. Measured after a warm-up, from the completions, and from the WAL and the transactions that PostgreSQL counts.
Goal: 300 jobs a second. As other work may take the cores, the CPU time of a job in the fleet's processes and in the
server's is reported too, and the rate that it allows if two cores do nothing else.
"""

import heapq
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from multiprocessing import get_context

import pytest

from tests.benchmarks import cpu
from tests.benchmarks.report import report, spread
from tests.benchmarks.test_claims import fill
from tests.services.postgres import Postgres
from zcore.jobs import claims, lifecycle
from zcore.jobs.claims import Lease
from zcore.jobs.database import Database

pytestmark = pytest.mark.benchmarks

WORKERS = 1000
GOAL_PER_S = 300
PROCESSES = 2
THREADS = 8
LEASE_S = 30.0
START_S = 8.0
"""For the processes of the fleet to start."""
WARM_UP_S = 10.0
MEASURED_S = 40.0
MARKS_INTERVAL_S = 15.0
COUNTERS = """
SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint,
       pg_snapshot_xmax(pg_current_snapshot())::text::bigint
"""


@pytest.fixture
def url(postgres: Postgres, migrated_template: str) -> Iterator[str]:
    with postgres.database(migrated_template) as database_url:
        yield database_url


@dataclass(frozen=True)
class Times:
    """The moments of one process, in seconds of the monotonic clock, which all processes share."""

    start: float

    @property
    def begin(self) -> float:
        """When the measurement begins."""
        return self.start + WARM_UP_S

    @property
    def end(self) -> float:
        """When it ends."""
        return self.begin + MEASURED_S


@dataclass(frozen=True)
class Part:
    """What one process did during the measurement."""

    jobs: int
    claim_ms: list[float]
    cpu_ms: float


class Fleet:
    """The schedule of one process: who does what next, and when (monotonic seconds)."""

    def __init__(self, database: Database, start: float) -> None:
        self._database = database
        self._order = itertools.count()
        self._changed = threading.Condition()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self.ended = 0
        self.claim_ms: list[float] = []
        for number in range(WORKERS // PROCESSES):
            name = f"worker-{os.getpid()}-{number}"
            self._at(start + number * PROCESSES / GOAL_PER_S, lambda name=name: self._claim(name))
        self._at(start, self._move_marks)

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
        self.ended += 1
        self._claim(name)

    def _move_marks(self) -> None:
        with self._database.write() as transaction:
            claims.advance_marks(transaction)
        self._at(time.monotonic() + MARKS_INTERVAL_S, self._move_marks)


def part_of_fleet(url: str, times: Times) -> Part:
    """Run one process of the fleet."""
    with closing(Database(url, pool_size=THREADS)) as database:
        fleet = Fleet(database, times.start)
        fleet.run(times.begin)
        ended, claimed, used = fleet.ended, len(fleet.claim_ms), time.process_time()
        fleet.run(times.end)
        return Part(fleet.ended - ended, fleet.claim_ms[claimed:], 1000 * (time.process_time() - used))


def test_fleet(url: str) -> None:
    with closing(Database(url, pool_size=1)) as database:
        fill(database, int(GOAL_PER_S * (WARM_UP_S + MEASURED_S) * 1.2) + WORKERS)
        times = Times(time.monotonic() + START_S)
        with ProcessPoolExecutor(PROCESSES, get_context("spawn")) as processes:
            parts = [processes.submit(part_of_fleet, url, times) for _ in range(PROCESSES)]
            time.sleep(times.begin - time.monotonic())
            server = cpu.processes_of(database)
            served, wal, transactions = cpu.server_ms(*server), *counters(database)
            time.sleep(times.end - time.monotonic())
            served, more_wal, more_transactions = cpu.server_ms(*server) - served, *counters(database)
            done = [part.result() for part in parts]
    jobs, used = sum(part.jobs for part in done), sum(part.cpu_ms for part in done)
    report(
        f"a fleet of {WORKERS} workers",
        jobs_per_s=round(jobs / MEASURED_S, 1),
        goal_per_s=GOAL_PER_S,
        share_of_the_cores=round((used + served) / 1000 / MEASURED_S / (os.cpu_count() or 1), 2),
        cpu_ms_per_job={"fleet": round(used / jobs, 2), "server": round(served / jobs, 2)},
        jobs_per_s_of_two_cores=round(2000 / ((used + served) / jobs)),
        claim_ms=spread([sample for part in done for sample in part.claim_ms]),
        wal_bytes_per_job=round((more_wal - wal) / jobs),
        transactions_per_job=round((more_transactions - transactions) / jobs, 2),
    )


def counters(database: Database) -> tuple[int, int]:
    """Return the bytes of WAL and the transactions that PostgreSQL has written so far."""
    with database.engine.connect() as connection:
        wal_bytes, transactions = connection.exec_driver_sql(COUNTERS).one()
        return int(wal_bytes), int(transactions)

"""A job that takes many leases keeps its own, for few statements: the heartbeat writes rarely, but often enough.

Time is simulated: it passes only while the heartbeat waits, and a maintenance task takes back expired leases all along.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from tests.integration.worker.stand_in_pipeline import Progress
from worker import heartbeat as heartbeat_module
from worker import periodic as periodic_module
from worker.context import WorkerContext
from worker.heartbeat import Heartbeat
from worker.phases import PhaseBudgets, StallWatch
from worker.shutdown import Shutdown
from zcore.errors import GenerationCanceled, LeaseLost
from zcore.jobs import claims, lifecycle, queries, recovery
from zcore.jobs.claims import Lease
from zcore.jobs.database import Database
from zcore.request import GenerationDefaults, RequestLimits, parse_submission
from zcore.settings import JobsSettings, WorkerSettings

LEASE_S = 30.0
JOB_S = 10 * LEASE_S


class SimulatedTime:
    """A clock that moves while something waits, calls `on_wait` each time and `every_second` once a second."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.on_wait: Callable[[], None] = lambda: None
        self.every_second: Callable[[], None] = lambda: None

    def now(self) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=self.seconds)

    def pass_by(self, duration_s: float) -> None:
        """Let time pass, not beyond the end of the job."""
        end = min(self.seconds + duration_s, JOB_S)
        while self.seconds < end:
            before, self.seconds = self.seconds, min(self.seconds + 1.0, end)
            if int(self.seconds) > int(before):
                self.every_second()
        self.on_wait()


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> SimulatedTime:
    """The time of the heartbeat and of the database."""
    time = SimulatedTime()

    class Event(threading.Event):
        """Lets time pass when waited for, and is set when the job is over, not when the test asks for that at once."""

        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            time.pass_by(timeout)
            return self.is_set()

        def is_set(self) -> bool:
            return time.seconds >= JOB_S

    monkeypatch.setattr(periodic_module, "threading", SimpleNamespace(Event=Event, Thread=threading.Thread))
    monkeypatch.setattr(heartbeat_module, "time", SimpleNamespace(monotonic=lambda: time.seconds))
    return time


@pytest.fixture
def database(each_database_url: str, time: SimulatedTime) -> Iterator[Database]:
    with closing(Database(each_database_url, clock=time.now)) as opened:
        yield opened


@pytest.fixture
def job_id(database: Database, time: SimulatedTime) -> UUID:
    """A queued job; once it runs, its lease is taken back when it expires."""
    submission = parse_submission({"prompt": "a fox"}, GenerationDefaults(), RequestLimits())
    with database.write() as transaction:
        job_id = lifecycle.submit(transaction, submission, "anna", "0" * 64, 3).job.id

    def take_back() -> None:
        with database.write() as transaction:
            recovery.rescue(transaction)

    time.every_second = take_back
    return job_id


def run(
    database: Database, time: SimulatedTime, progress_interval_s: float = 1.0, *, makes_steps: bool = False
) -> Heartbeat:
    """Claim the job and let its heartbeat run for `JOB_S`, or until it gives the job up."""
    with database.write() as transaction:
        job = claims.claim(transaction, "worker-1", LEASE_S)
    assert job is not None
    context = WorkerContext(
        database,
        SimpleNamespace(is_away=False),
        JobsSettings(lease_s=LEASE_S),
        WorkerSettings(progress_interval_s=progress_interval_s),
        name="worker-1",
        shutdown=Shutdown(grace_s=0),
        notify=lambda _stage: None,
        on_ended=lambda: None,
        on_broken=lambda: None,
        on_hung=lambda _reason: None,
    )
    budgets = PhaseBudgets(floor_s=2 * JOB_S, least_s=LEASE_S, factor=20)
    watch = StallWatch(budgets, deadline_s=2 * JOB_S, clock=lambda: time.seconds)
    heartbeat = Heartbeat(context, job, watch, lambda _heartbeat, _reason: None)
    if makes_steps:
        time.on_wait = lambda: heartbeat.on_step(Progress("denoise", int(time.seconds * 4), 1200))
    heartbeat.start()
    heartbeat.stop()
    return heartbeat


@contextmanager
def counting(database: Database) -> Iterator[Counter[str]]:
    """Count the statements that touch the queue, by their first word."""
    counts = Counter[str]()

    def count(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "queue" in statement:
            counts[statement.split()[0]] += 1

    event.listen(database.engine, "before_cursor_execute", count)
    try:
        yield counts
    finally:
        event.remove(database.engine, "before_cursor_execute", count)


def lose(monkeypatch: pytest.MonkeyPatch, is_lost: Callable[[int], bool]) -> list[int]:
    """Lose the heartbeats whose number `is_lost` selects: the database does not answer. Returns those lost so far."""
    send, sent, lost = claims.heartbeat, [0], list[int]()

    def shaky(transaction: Any, lease: Lease, lease_s: float, progress: Any = None) -> Any:
        sent[0] += 1
        if is_lost(sent[0]):
            lost.append(sent[0])
            raise OperationalError("UPDATE", {}, Exception("the database does not answer"))
        return send(transaction, lease, lease_s, progress)

    monkeypatch.setattr(claims, "heartbeat", shaky)
    return lost


def state(database: Database, job_id: UUID) -> tuple[str, int]:
    with database.read() as transaction:
        job = queries.get(transaction, job_id)
        return job.status, job.attempt


def test_a_job_of_many_leases_survives_lost_heartbeats(
    database: Database, time: SimulatedTime, job_id: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = lose(monkeypatch, lambda number: number % 2 == 0)
    run(database, time).check()
    assert len(lost) > 10
    assert state(database, job_id) == ("running", 1)


def test_a_progress_interval_above_the_lease_does_not_lose_the_job(
    database: Database, time: SimulatedTime, job_id: UUID
) -> None:
    run(database, time, progress_interval_s=5 * LEASE_S).check()
    assert state(database, job_id) == ("running", 1)


def test_a_worker_that_does_not_reach_the_database_for_a_lease_gives_its_job_up(
    database: Database, time: SimulatedTime, job_id: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose(monkeypatch, lambda number: number > 5)
    heartbeat = run(database, time)
    with pytest.raises(LeaseLost):
        heartbeat.check()
    assert state(database, job_id) == ("queued", 1)


def test_a_job_that_makes_no_steps_writes_three_times_a_lease(
    database: Database, time: SimulatedTime, job_id: UUID
) -> None:
    time.every_second = lambda: None
    with counting(database) as counts:
        run(database, time).check()
    claim = 1
    assert counts["UPDATE"] - claim == pytest.approx(3 * JOB_S / LEASE_S, abs=1)
    assert counts["SELECT"] <= JOB_S, "it reads whether the job was canceled at most once a second"
    assert state(database, job_id) == ("running", 1)


def test_a_job_that_makes_steps_writes_once_and_reads_four_times_a_second_at_most(
    database: Database, time: SimulatedTime, job_id: UUID
) -> None:
    time.every_second = lambda: None
    with counting(database) as counts:
        run(database, time, makes_steps=True)
    claim = 1
    assert JOB_S * 0.7 <= counts["UPDATE"] - claim <= JOB_S, "progress and lease share a write"
    assert counts["SELECT"] + counts["UPDATE"] <= 4 * JOB_S + claim
    with database.read() as transaction:
        assert queries.get(transaction, job_id).progress_step > 1190


def test_a_heartbeat_sees_a_cancellation_request_without_any_step(
    database: Database, time: SimulatedTime, job_id: UUID
) -> None:
    def cancel() -> None:
        if int(time.seconds) == 100:
            with database.write() as transaction:
                lifecycle.cancel(transaction, job_id)

    time.every_second = cancel
    heartbeat = run(database, time)
    with pytest.raises(GenerationCanceled):
        heartbeat.check()

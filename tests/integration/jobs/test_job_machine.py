"""The whole life of jobs under several workers that crash, come back late, and are told things twice.

Hypothesis writes the story; beside the database stands a model of each job in plain Python, and after every step the
rows have to equal it. What the model does not know by construction is asked of the record itself: that its events are
a way TRANSITIONS allow, that no two leases are ever good for one job, that nobody is told twice.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Row, delete, select

from tests.integration.jobs.examples import (
    DEFECT,
    HOOK,
    LEASE_S,
    RETENTION_S,
    RETRY_DELAY_S,
    SLIP,
    Clock,
    cancel,
    claim,
    complete,
    fail,
    pass_on,
    reencode,
    rescue,
    submit,
)
from zcore.errors import Conflict
from zcore.jobs import lifecycle, queries
from zcore.jobs.database import Database
from zcore.jobs.lifecycle import Lease
from zcore.jobs.models import Event, Job, Output, WebhookEvent
from zcore.jobs.states import TERMINAL, TRANSITIONS, State
from zcore.stages import Stage

SILENT_S = 10.0
ATTEMPTS = st.integers(1, 3)
WORKERS = st.sampled_from(["worker-1", "worker-2", "worker-3"])
STAGES = st.sampled_from(list(Stage))
SERVED = st.sampled_from([(Stage.ENCODE,), (Stage.GENERATE,), tuple(Stage)])


@dataclass
class Expected:
    """What a job has to look like."""

    id: uuid.UUID
    priority: int
    hook: bool
    attempts_left: int
    available_at: datetime
    announced_at: datetime | None
    stage: Stage = Stage.GENERATE
    embedding_attempt: int | None = None
    stored: set[int] = field(default_factory=set)  # the attempts whose embeddings lie in storage
    status: State = State.QUEUED
    attempt: int = 0
    lease: Lease | None = None
    lease_until: datetime | None = None
    wish: bool = False
    expires_at: datetime | None = None
    pictures: int = 0
    events: list[str] = field(default_factory=lambda: ["queued"])
    told: list[str] = field(default_factory=list)

    def become(self, status: State, event: str) -> None:
        """A step to another state."""
        self.status = status
        self.events.append(event)
        if status is not State.RUNNING:
            self.lease = self.lease_until = None
        if self.hook and status in (State.SUCCEEDED, State.FAILED, State.CANCELED):
            self.told.append(f"job.{status}")


class JobMachine(RuleBasedStateMachine):
    """Callers, workers living and dead, and the clock work, all at one record."""

    jobs: Bundle[uuid.UUID] = Bundle("jobs")
    leases: Bundle[Lease] = Bundle("leases")

    def __init__(self, database: Database, clock: Clock) -> None:
        super().__init__()
        self.database, self.clock = database, clock
        self.expected: dict[uuid.UUID, Expected] = {}
        self.given: list[Lease] = []
        self.encoders: dict[Lease, int] = {}  # the leases of those who only encode, with their attempt

    @initialize(target=jobs, max_attempts=ATTEMPTS)
    def begin(self, max_attempts: int) -> MultipleResults[uuid.UUID]:
        with self.database.write() as transaction:
            transaction.session.execute(delete(Job))
        return multiple(*[self.submit_one(0, stage is Stage.ENCODE, max_attempts, stage) for stage in Stage])

    # What callers do

    @rule(
        target=jobs,
        priorities=st.lists(st.integers(-1, 1), min_size=1, max_size=2),
        hook=st.booleans(),
        max_attempts=ATTEMPTS,
        stage=STAGES,
    )
    def submit(self, priorities: list[int], hook: bool, max_attempts: int, stage: Stage) -> MultipleResults[uuid.UUID]:
        return multiple(*[self.submit_one(priority, hook, max_attempts, stage) for priority in priorities])

    @rule(job_id=jobs)
    def cancel(self, job_id: uuid.UUID) -> None:
        job = self.expected[job_id]
        if job.status is State.QUEUED:
            job.become(State.CANCELED, "canceled")
        elif job.status is State.RUNNING and not job.wish:
            job.wish = True
            job.events.append("cancel_requested")
        assert cancel(self.database, job_id).status == job.status

    @rule(lease=leases, max_attempts=ATTEMPTS, stage=STAGES)
    def change_mind(self, lease: Lease, max_attempts: int, stage: Stage) -> None:
        """Somebody retries what ended badly, and cancels everything else."""
        if self.expected[lease.job_id].status in (State.FAILED, State.CANCELED):
            self.retry(lease.job_id, max_attempts, stage)
        else:
            self.cancel(lease.job_id)

    @rule(job_id=jobs, max_attempts=ATTEMPTS, stage=STAGES)
    def retry(self, job_id: uuid.UUID, max_attempts: int, stage: Stage) -> None:
        job = self.expected[job_id]
        if job.status not in (State.FAILED, State.CANCELED):
            with pytest.raises(Conflict), self.database.write() as transaction:
                lifecycle.retry(transaction, job_id, max_attempts, stage)
            return
        with self.database.write() as transaction:
            lifecycle.retry(transaction, job_id, max_attempts, stage)
        job.become(State.QUEUED, "retried")
        if job.embedding_attempt is None:
            job.stage = stage
        job.attempts_left, job.wish = max_attempts, False
        job.available_at = job.announced_at = self.clock.now

    # What workers do, the dead ones too: a lease stays in hand however long it has been lost

    @rule(target=leases, worker=WORKERS, doorbells=st.integers(1, 3), stages=SERVED)
    def wake(self, worker: str, doorbells: int, stages: tuple[Stage, ...]) -> MultipleResults[Lease]:
        """A doorbell, perhaps rung more than once: each wakes a worker that takes what is best, or leaves."""
        taken = []
        for _ in range(doorbells):
            best = self.best(stages)
            if best is None:
                with self.database.write() as transaction:
                    assert lifecycle.claim(transaction, worker, LEASE_S, stages) is None
                continue
            lease = claim(self.database, worker, stages)
            assert lease.job_id == best.id
            best.become(State.RUNNING, "claimed")
            best.attempt, best.attempts_left = best.attempt + 1, best.attempts_left - 1
            best.lease, best.lease_until = lease, self.clock.now + timedelta(seconds=LEASE_S)
            if stages == (Stage.ENCODE,):
                best.embedding_attempt = best.attempt
                self.encoders[lease] = best.attempt
            taken.append(lease)
        self.given += taken
        return multiple(*taken)

    @rule(target=leases, worker=WORKERS, dies=st.sampled_from(["never", "before", "after"]))
    def encode(self, worker: str, dies: str) -> MultipleResults[Lease]:
        """A worker without a GPU that gets through one job, unless it dies before or after its object is stored."""
        taken = self.wake(worker, 1, (Stage.ENCODE,))
        for lease in taken.values:
            if dies != "before":
                self.store_embedding(lease)
            if dies == "never":
                self.pass_on(lease)
        return taken

    @rule(
        target=leases,
        worker=WORKERS,
        ending=st.sampled_from(["complete", "slip", "defect", "hand_back", "wish", "no embedding"]),
        stages=st.sampled_from([(Stage.GENERATE,), tuple(Stage)]),
    )
    def work(self, worker: str, ending: str, stages: tuple[Stage, ...]) -> MultipleResults[Lease]:
        """A worker that gets through one job, or as far as it gets."""
        taken = self.wake(worker, 1, stages)
        for lease in taken.values:
            self.beat(lease)
            match ending:
                case "complete":
                    self.complete(lease)
                case "slip" | "defect":
                    self.fail(lease, retryable=ending == "slip")
                case "hand_back":
                    self.hand_back(lease)
                case "no embedding":
                    self.reencode(lease)
                case _:
                    self.cancel(lease.job_id)
                    self.see_the_wish(lease)
        return taken

    @rule(lease=leases)
    def beat(self, lease: Lease) -> None:
        with self.database.write() as transaction:
            beat = lifecycle.heartbeat(transaction, lease, LEASE_S, ("denoising", 1, 8))
        job = self.holder(lease)
        assert (beat is None) == (job is None)
        if beat is not None and job is not None:
            assert beat.cancel_requested == job.wish
            job.lease_until = self.clock.now + timedelta(seconds=LEASE_S)

    @rule(lease=leases)
    def complete(self, lease: Lease) -> None:
        job = self.holder(lease)
        assert (complete(self.database, lease) is None) == (job is None)
        if job is not None:
            job.become(State.SUCCEEDED, "succeeded")
            job.expires_at, job.pictures = self.clock.now + timedelta(seconds=RETENTION_S), 1

    @rule(lease=leases, retryable=st.booleans())
    def fail(self, lease: Lease, retryable: bool) -> None:
        job = self.holder(lease)
        assert (fail(self.database, lease, SLIP if retryable else DEFECT) is None) == (job is None)
        if job is None:
            return
        if job.wish:
            job.become(State.CANCELED, "canceled")
        elif retryable and job.attempts_left > 0:
            job.become(State.QUEUED, "postponed")
            delay_s = RETRY_DELAY_S * 2 ** min(job.attempt - 1, lifecycle.RETRY_DOUBLINGS_AT_MOST)
            job.available_at, job.announced_at = self.clock.now + timedelta(seconds=delay_s), None
        else:
            job.become(State.FAILED, "failed")

    @rule(lease=leases)
    def hand_back(self, lease: Lease) -> None:
        job = self.holder(lease)
        with self.database.write() as transaction:
            assert (lifecycle.hand_back(transaction, lease) is None) == (job is None)
        if job is None:
            return
        if job.wish:
            job.become(State.CANCELED, "canceled")
        else:
            job.become(State.QUEUED, "handed_back")
            job.attempts_left, job.announced_at = job.attempts_left + 1, None

    @rule(lease=leases)
    def store_embedding(self, lease: Lease) -> None:
        """An encoder's object is in storage; one that finds its lease lost then takes its own away again."""
        attempt = self.encoders.get(lease)
        if attempt is not None:
            self.expected[lease.job_id].stored |= {attempt} if self.holder(lease) else set()

    @rule(lease=leases)
    def pass_on(self, lease: Lease) -> None:
        """Of an encoder's lease, as no other worker has anything to pass on."""
        if lease not in self.encoders:
            return
        self.store_embedding(lease)
        job = self.holder(lease)
        assert (pass_on(self.database, lease) is None) == (job is None)
        if job is None:
            return
        if job.wish:
            job.become(State.CANCELED, "canceled")
        else:
            job.become(State.QUEUED, "encoded")
            job.stage, job.attempts_left = Stage.GENERATE, job.attempts_left + 1
            job.available_at = job.announced_at = self.clock.now

    @rule(lease=leases)
    def reencode(self, lease: Lease) -> None:
        job = self.holder(lease)
        assert (reencode(self.database, lease) is None) == (job is None)
        if job is None:
            return
        if job.wish:
            job.become(State.CANCELED, "canceled")
        elif job.embedding_attempt is None or job.attempts_left > 0:
            job.become(State.QUEUED, "sent_to_encode")
            job.attempts_left += 1 if job.embedding_attempt is None else 0
            job.stage, job.announced_at = Stage.ENCODE, self.clock.now
        else:
            job.become(State.FAILED, "failed")

    @rule(lease=leases)
    def see_the_wish(self, lease: Lease) -> None:
        job = self.holder(lease)
        canceled = job is not None and job.wish
        with self.database.write() as transaction:
            assert (lifecycle.acknowledge_cancel(transaction, lease) is not None) == canceled
        if job is not None and canceled:
            job.become(State.CANCELED, "canceled")

    # What the clock does

    @rule(lease=leases)
    def stall(self, lease: Lease) -> None:
        """A worker hangs, or is gone, for as long as it takes to be noticed. It may come back with its old lease."""
        self.clock.advance(LEASE_S + 1)
        self.rescue()

    @rule(seconds=st.sampled_from([0.5, 3.0, LEASE_S - 1, LEASE_S + 1, RETENTION_S]), upkeep=st.booleans())
    def wait(self, seconds: float, upkeep: bool) -> None:
        self.clock.advance(seconds)
        if upkeep:
            self.rescue()
            self.announce()
            self.expire()
            self.clear_embeddings()

    # What always holds

    @invariant()
    def the_record_equals_the_model(self) -> None:
        with self.database.read() as transaction:
            rows = {row.id: row for row in transaction.session.execute(select(*Job.__table__.columns))}
            pictures = transaction.session.scalars(select(Output.job_id)).all()
            events = transaction.session.execute(select(Event.job_id, Event.type).order_by(Event.id)).all()
            webhooks = transaction.session.execute(
                select(WebhookEvent.job_id, WebhookEvent.type).order_by(WebhookEvent.id)
            ).all()
        assert rows.keys() == self.expected.keys()
        for job_id, job in self.expected.items():
            compare(rows[job_id], job)
            assert pictures.count(job_id) == job.pictures
            story = [event.type for event in events if event.job_id == job_id]
            assert story == job.events
            assert allowed_ends(story) == {job.status}
            assert story.count("succeeded") <= 1
            assert [webhook.type for webhook in webhooks if webhook.job_id == job_id] == job.told
            # No object without a row that knows of it, so that none stays when the job has ended.
            assert not job.stored or job.embedding_attempt is not None
            assert all(attempt <= job.attempt for attempt in job.stored)

    def teardown(self) -> None:
        """Of all the leases ever given, no two are good for one job; asked of the database without changing it."""
        with self.database.write() as transaction:
            good = [one for one in self.given if lifecycle.heartbeat(transaction, one, LEASE_S) is not None]
            transaction.session.rollback()
        assert len({lease.job_id for lease in good}) == len(good)
        assert {lease.token for lease in good} == {job.lease.token for job in self.expected.values() if job.lease}

    def submit_one(self, priority: int, hook: bool, max_attempts: int, stage: Stage) -> uuid.UUID:
        url = HOOK if hook else None
        job = submit(self.database, priority=priority, webhook_url=url, max_attempts=max_attempts, stage=stage)
        now = self.clock.now
        self.expected[job.id] = Expected(job.id, priority, hook, max_attempts, now, now, stage)
        return job.id

    def rescue(self) -> None:
        lost = [job for job in self.expected.values() if job.lease_until and job.lease_until < self.clock.now]
        assert {job.id for job in rescue(self.database)} == {job.id for job in lost}
        for job in lost:
            if job.wish:
                job.become(State.CANCELED, "canceled")
            elif job.attempts_left > 0:
                job.become(State.QUEUED, "rescued")
                job.announced_at = None
            else:
                job.become(State.FAILED, "failed")

    def announce(self) -> None:
        for stage in Stage:
            silent = [
                job
                for job in self.due([stage])
                if job.announced_at is None or job.announced_at < self.clock.now - timedelta(seconds=SILENT_S)
            ]
            with self.database.write() as transaction:
                assert lifecycle.mark_announced(transaction, stage, SILENT_S, 100) == len(silent)
            for job in silent:
                job.announced_at = self.clock.now

    def expire(self) -> None:
        over = [job for job in self.expected.values() if job.status is State.SUCCEEDED and self.is_over(job)]
        with self.database.write() as transaction:
            due = [job.id for job in queries.past_retention(transaction, 100)]
            assert set(due) == {job.id for job in over}
            assert all(lifecycle.expire(transaction, job_id) is not None for job_id in due)
        for job in over:
            job.become(State.EXPIRED, "expired")

    def clear_embeddings(self) -> None:
        """Every ended job's are gone afterwards; those of jobs that go on are not touched."""
        over = [job for job in self.expected.values() if job.status in TERMINAL and job.embedding_attempt is not None]
        with self.database.write() as transaction:
            ended = queries.ended_with_embedding(transaction, 100)
            assert {job.id for job in ended} == {job.id for job in over}
            assert all(lifecycle.forget_embeddings(transaction, job.id, job.attempt) for job in ended)
        for job in over:
            job.embedding_attempt = None
            job.stored -= set(range(1, job.attempt + 1))

    def is_over(self, job: Expected) -> bool:
        return job.expires_at is not None and job.expires_at <= self.clock.now

    def due(self, stages: Sequence[Stage]) -> list[Expected]:
        """Queued jobs at these stages whose time has come."""
        queued = [job for job in self.expected.values() if job.status is State.QUEUED and job.stage in stages]
        return [job for job in queued if job.available_at <= self.clock.now]

    def best(self, stages: Sequence[Stage]) -> Expected | None:
        """The job that a worker of these stages has to get."""
        return min(self.due(stages), key=lambda job: (-job.priority, job.id), default=None)

    def holder(self, lease: Lease) -> Expected | None:
        """The job whose lease this still is."""
        job = self.expected[lease.job_id]
        return job if job.lease == lease else None


def compare(row: Row[Any], job: Expected) -> None:
    """The row is as expected, and as every row in its state has to be."""
    assert (row.status, row.attempt, row.attempts_left) == (job.status, job.attempt, job.attempts_left)
    assert row.lease_token == (job.lease.token if job.lease else None)
    assert row.lease_until == job.lease_until
    assert (row.cancel_requested_at is not None) == job.wish
    assert (row.available_at, row.announced_at) == (job.available_at, job.announced_at)
    assert row.expires_at == job.expires_at
    assert (row.stage, row.embedding_attempt) == (job.stage, job.embedding_attempt)
    if row.status == State.QUEUED:
        assert row.attempts_left > 0
        assert row.cancel_requested_at is None


def allowed_ends(story: Sequence[str]) -> set[State]:
    """Where TRANSITIONS can lead by these events; nowhere when they are no way."""
    here = {State.QUEUED} if story[0] == "queued" else set[State]()
    for event in story[1:]:
        if event == "cancel_requested":
            here &= {State.RUNNING}
        else:
            here = {way.target for way in TRANSITIONS if way.event == event and way.sources & here}
    return here


def play(database: Database, clock: Clock, examples: int, steps: int) -> None:
    run_state_machine_as_test(
        lambda: JobMachine(database, clock), settings=settings(max_examples=examples, stateful_step_count=steps)
    )


def test_jobs_keep_the_law_whatever_happens_on_sqlite(sqlite: Database, clock: Clock) -> None:
    play(sqlite, clock, examples=80, steps=30)


def test_jobs_keep_the_law_whatever_happens_on_postgresql(postgresql: Database, clock: Clock) -> None:
    play(postgresql, clock, examples=8, steps=25)


def test_a_story_that_the_law_forbids_leads_nowhere() -> None:
    assert allowed_ends(["queued", "claimed", "succeeded"]) == {State.SUCCEEDED}
    assert allowed_ends(["queued", "succeeded"]) == set()
    assert allowed_ends(["queued", "claimed", "succeeded", "retried"]) == set()
    assert allowed_ends(["queued", "claimed", "encoded", "claimed", "succeeded"]) == {State.SUCCEEDED}
    assert allowed_ends(["queued", "encoded"]) == set()
    assert allowed_ends(["claimed"]) == set()

"""Random histories of jobs under several workers that crash, return late and are notified twice.

Hypothesis generates the histories. After every step, the rows must equal a model of each job in plain Python. What the
model does not guarantee is checked on the record: its events are allowed by TRANSITIONS, no two leases are ever valid
for one job, and no caller is notified twice.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

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
from sqlalchemy import select

from tests.integration.jobs.examples import (
    HOOK,
    LEASE_S,
    PERMANENT,
    RETENTION_S,
    RETRY_DELAY_S,
    TRANSIENT,
    Clock,
    cancel,
    claim,
    complete,
    complete_encoding,
    empty,
    fail,
    reencode,
    rescue,
    submit,
)
from zcore.errors import Conflict
from zcore.jobs import claims, leftovers, lifecycle, queries, recovery
from zcore.jobs.claims import Lease
from zcore.jobs.database import Database
from zcore.jobs.guarded_update import LEFTOVER_DELAY
from zcore.jobs.models import Event, Job, Leftover, Output, WebhookEvent
from zcore.jobs.states import TERMINAL, TRANSITIONS, State
from zcore.stages import Stage

OVERDUE_S = 10.0
ATTEMPTS = st.integers(1, 3)
WORKERS = st.sampled_from(["worker-1", "worker-2", "worker-3"])
STAGES = st.sampled_from(list(Stage))
SERVED = st.sampled_from([(Stage.ENCODE,), (Stage.GENERATE,), tuple(Stage)])


@dataclass
class Expected:
    """Expected state of a job."""

    id: uuid.UUID
    priority: int
    hook: bool
    attempts_left: int
    available_at: datetime
    notified_at: datetime | None
    stage: Stage = Stage.GENERATE
    embedding_attempt: int | None = None
    stored: set[int] = field(default_factory=set)  # the attempts whose embeddings are in storage
    status: State = State.QUEUED
    scheduled: bool = False  # its delay was not over when a claim or maintenance last looked
    isolated: bool = False
    poison: bool = False
    left_over: bool = False  # recorded as having left objects
    attempt: int = 0
    lease: Lease | None = None
    lease_until: datetime | None = None
    cancel_requested: bool = False
    expires_at: datetime | None = None
    images: int = 0
    events: list[str] = field(default_factory=lambda: ["queued"])
    webhooks: list[str] = field(default_factory=list)

    def become(self, status: State, event: str) -> None:
        """Change to another state."""
        self.status = status
        self.events.append(event)
        if status is not State.RUNNING:
            self.lease = self.lease_until = None
        if status in (State.SUCCEEDED, State.FAILED, State.CANCELED):
            self.isolated = self.scheduled = False
            lost_attempts = self.attempt - (1 if status is State.SUCCEEDED else 0)
            self.left_over = lost_attempts > 0 or self.embedding_attempt is not None
        if self.hook and status in (State.SUCCEEDED, State.FAILED, State.CANCELED):
            self.webhooks.append(f"job.{status}")


class JobMachine(RuleBasedStateMachine):
    """Callers, workers (alive and lost) and maintenance that use one database."""

    jobs: Bundle[uuid.UUID] = Bundle("jobs")
    leases: Bundle[Lease] = Bundle("leases")

    def __init__(self, database: Database, clock: Clock) -> None:
        super().__init__()
        self.database, self.clock = database, clock
        self.expected: dict[uuid.UUID, Expected] = {}
        self.given: list[Lease] = []
        self.encoders: dict[Lease, int] = {}  # the leases of workers that only encode, with their attempts

    @initialize(target=jobs, max_attempts=ATTEMPTS)
    def begin(self, max_attempts: int) -> MultipleResults[uuid.UUID]:
        empty(self.database)
        return multiple(*[self.submit_one(0, stage is Stage.ENCODE, max_attempts, stage) for stage in Stage])

    # Callers

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
        elif job.status is State.RUNNING and not job.cancel_requested:
            job.cancel_requested = True
            job.events.append("cancel_requested")
        assert cancel(self.database, job_id).status == job.status

    @rule(lease=leases, max_attempts=ATTEMPTS, stage=STAGES)
    def retry_or_cancel(self, lease: Lease, max_attempts: int, stage: Stage) -> None:
        """Retry the job if it failed or was canceled, otherwise cancel it."""
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
        job.isolated = job.poison
        job.become(State.QUEUED, "retried")
        if not job.left_over:
            job.embedding_attempt = None
        if job.embedding_attempt is None:
            job.stage = stage
        job.left_over = job.poison = False
        job.attempts_left, job.cancel_requested = max_attempts, False
        job.available_at = job.notified_at = self.clock.now

    # Workers, including lost ones: a worker may use a lease at any time after it was lost

    @rule(target=leases, worker=WORKERS, notifications=st.integers(1, 3), stages=SERVED)
    def notify(self, worker: str, notifications: int, stages: tuple[Stage, ...]) -> MultipleResults[Lease]:
        """Notify workers, possibly more than once: each claims the best job, or finds none."""
        taken = []
        for _ in range(notifications):
            best = self.best(stages)
            if best is None:
                self.promote()
                best = self.best(stages)
            if best is None:
                with self.database.write() as transaction:
                    assert claims.claim(transaction, worker, LEASE_S, stages) is None
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
        """Encode one job's prompt, unless the worker dies before or after it stores the embedding."""
        taken = self.notify(worker, 1, (Stage.ENCODE,))
        for lease in taken.values:
            if dies != "before":
                self.store_embedding(lease)
            if dies == "never":
                self.complete_encoding(lease)
        return taken

    @rule(
        target=leases,
        worker=WORKERS,
        ending=st.sampled_from(["complete", "transient", "permanent", "release", "cancel", "reencode"]),
        stages=st.sampled_from([(Stage.GENERATE,), tuple(Stage)]),
    )
    def work(self, worker: str, ending: str, stages: tuple[Stage, ...]) -> MultipleResults[Lease]:
        """Claim one job and end the attempt."""
        taken = self.notify(worker, 1, stages)
        for lease in taken.values:
            self.renewal(lease)
            match ending:
                case "complete":
                    self.complete(lease)
                case "transient" | "permanent":
                    self.fail(lease, retryable=ending == "transient")
                case "release":
                    self.release(lease)
                case "reencode":
                    self.reencode(lease)
                case _:
                    self.cancel(lease.job_id)
                    self.acknowledge_cancel(lease)
        return taken

    @rule(lease=leases)
    def renewal(self, lease: Lease) -> None:
        with self.database.write() as transaction:
            renewal = claims.heartbeat(transaction, lease, LEASE_S, ("denoising", 1, 8))
        job = self.holder(lease)
        assert (renewal is None) == (job is None)
        if renewal is not None and job is not None:
            assert renewal.cancel_requested == job.cancel_requested
            job.lease_until = self.clock.now + timedelta(seconds=LEASE_S)

    @rule(lease=leases)
    def complete(self, lease: Lease) -> None:
        job = self.holder(lease)
        assert (complete(self.database, lease) is None) == (job is None)
        if job is not None:
            job.become(State.SUCCEEDED, "succeeded")
            job.expires_at, job.images = self.clock.now + timedelta(seconds=RETENTION_S), 1

    @rule(lease=leases, retryable=st.booleans())
    def fail(self, lease: Lease, retryable: bool) -> None:
        job = self.holder(lease)
        assert (fail(self.database, lease, TRANSIENT if retryable else PERMANENT) is None) == (job is None)
        if job is None:
            return
        if job.cancel_requested:
            job.become(State.CANCELED, "canceled")
        elif retryable and job.attempts_left > 0:
            job.become(State.QUEUED, "retry_scheduled")
            delay_s = RETRY_DELAY_S * 2 ** min(job.attempt - 1, lifecycle.MAX_RETRY_DOUBLINGS)
            job.available_at, job.notified_at = self.clock.now + timedelta(seconds=delay_s), None
            job.scheduled = True
        else:
            job.become(State.FAILED, "failed")

    @rule(lease=leases)
    def release(self, lease: Lease) -> None:
        job = self.holder(lease)
        with self.database.write() as transaction:
            assert (lifecycle.release(transaction, lease) is None) == (job is None)
        if job is None:
            return
        if job.cancel_requested:
            job.become(State.CANCELED, "canceled")
        else:
            job.become(State.QUEUED, "released")
            job.attempts_left, job.notified_at = job.attempts_left + 1, None

    @rule(lease=leases)
    def store_embedding(self, lease: Lease) -> None:
        """Store the embedding of an encoder, which deletes it again if it finds its lease lost."""
        attempt = self.encoders.get(lease)
        if attempt is not None:
            self.expected[lease.job_id].stored |= {attempt} if self.holder(lease) else set()

    @rule(lease=leases)
    def complete_encoding(self, lease: Lease) -> None:
        """Complete the encoding, if the lease belongs to a worker that encodes."""
        if lease not in self.encoders:
            return
        self.store_embedding(lease)
        job = self.holder(lease)
        assert (complete_encoding(self.database, lease) is None) == (job is None)
        if job is None:
            return
        if job.cancel_requested:
            job.become(State.CANCELED, "canceled")
        else:
            job.become(State.QUEUED, "encoded")
            job.stage, job.attempts_left = Stage.GENERATE, job.attempts_left + 1
            job.available_at = job.notified_at = self.clock.now

    @rule(lease=leases)
    def reencode(self, lease: Lease) -> None:
        job = self.holder(lease)
        assert (reencode(self.database, lease) is None) == (job is None)
        if job is None:
            return
        if job.cancel_requested:
            job.become(State.CANCELED, "canceled")
        elif job.embedding_attempt is None or job.attempts_left > 0:
            job.become(State.QUEUED, "returned_to_encode")
            job.attempts_left += 1 if job.embedding_attempt is None else 0
            job.stage, job.notified_at = Stage.ENCODE, self.clock.now
        else:
            job.become(State.FAILED, "failed")

    @rule(lease=leases)
    def acknowledge_cancel(self, lease: Lease) -> None:
        job = self.holder(lease)
        canceled = job is not None and job.cancel_requested
        with self.database.write() as transaction:
            assert (lifecycle.acknowledge_cancel(transaction, lease) is not None) == canceled
        if job is not None and canceled:
            job.become(State.CANCELED, "canceled")

    # Maintenance

    @rule(lease=leases)
    def stall(self, lease: Lease) -> None:
        """A worker hangs or is lost until its lease expires. It may come back with its old lease."""
        self.clock.advance(LEASE_S + 1)
        self.rescue()

    @rule(seconds=st.sampled_from([0.5, 3.0, LEASE_S - 1, LEASE_S + 1, RETENTION_S]), maintenance=st.booleans())
    def wait(self, seconds: float, maintenance: bool) -> None:
        self.clock.advance(seconds)
        if maintenance:
            self.rescue()
            self.notify_again()
            self.expire()
            with self.database.write() as transaction:
                claims.advance_marks(transaction)
                claims.repair_marks(transaction)
            self.delete_leftovers()

    # Invariants

    @invariant()
    def the_rows_equal_the_model(self) -> None:
        with self.database.read() as transaction:
            rows = {job.id: job for job in transaction.session.scalars(select(Job))}
            images = transaction.session.scalars(select(Output.job_id)).all()
            events = transaction.session.execute(select(Event.job_id, Event.type).order_by(Event.id)).all()
            webhooks = transaction.session.execute(
                select(WebhookEvent.job_id, WebhookEvent.type).order_by(WebhookEvent.id)
            ).all()
        assert rows.keys() == self.expected.keys()
        for job_id, job in self.expected.items():
            compare(rows[job_id], job)
            assert images.count(job_id) == job.images
            history = [event.type for event in events if event.job_id == job_id]
            history.insert(0, "queued")  # the submission itself has no row
            assert history == job.events
            assert possible_states(history) == {job.status}
            assert history.count("succeeded") <= 1
            assert [webhook.type for webhook in webhooks if webhook.job_id == job_id] == job.webhooks
            # Every object in storage is recorded in a row, so that none is left when the job has ended.
            assert not job.stored or job.left_over or job.status not in TERMINAL
            assert all(attempt <= job.attempt for attempt in job.stored)

    def teardown(self) -> None:
        """Check that no two leases are valid for one job, by heartbeats that are rolled back."""
        with self.database.write() as transaction:
            valid = [one for one in self.given if claims.heartbeat(transaction, one, LEASE_S) is not None]
            transaction.session.rollback()
        assert len({lease.job_id for lease in valid}) == len(valid)
        assert {lease.token for lease in valid} == {job.lease.token for job in self.expected.values() if job.lease}

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
            if job.cancel_requested:
                job.become(State.CANCELED, "canceled")
            elif not job.isolated or job.attempts_left > 0:
                job.become(State.QUEUED, "rescued")
                job.attempts_left += 0 if job.isolated else 1
                job.isolated, job.notified_at = True, None
            else:
                job.become(State.FAILED, "failed")
                job.poison = True

    def promote(self) -> None:
        """Make the scheduled jobs ready that are due."""
        for job in self.expected.values():
            job.scheduled = job.scheduled and job.available_at > self.clock.now

    def notify_again(self) -> None:
        self.promote()
        with self.database.write() as transaction:
            claims.promote(transaction)
        for stage in Stage:
            overdue = [
                job
                for job in self.due([stage])
                if job.notified_at is None or job.notified_at < self.clock.now - timedelta(seconds=OVERDUE_S)
            ]
            with self.database.write() as transaction:
                assert recovery.mark_notified(transaction, stage, OVERDUE_S, 100) == len(overdue)
            for job in overdue:
                job.notified_at = self.clock.now

    def expire(self) -> None:
        over = [job for job in self.expected.values() if job.status is State.SUCCEEDED and self.is_over(job)]
        with self.database.write() as transaction:
            due = [job.id for job in queries.past_retention(transaction, 100)]
            assert set(due) == {job.id for job in over}
            assert all(recovery.expire(transaction, job_id) is not None for job_id in due)
        for job in over:
            job.become(State.EXPIRED, "expired")
            job.left_over = True

    def delete_leftovers(self) -> None:
        """Delete the leftovers of every ended job, and no others."""
        self.clock.advance(LEFTOVER_DELAY.total_seconds())
        over = [job for job in self.expected.values() if job.left_over]
        with self.database.write() as transaction:
            due = leftovers.claim_due(transaction, 100)
            assert {one.job_id for one in due if isinstance(one, Leftover)} == {job.id for job in over}
            for one in due:
                leftovers.forget(transaction, one)
        for job in over:
            job.left_over = False
            job.stored -= set(range(1, job.attempt + 1))

    def is_over(self, job: Expected) -> bool:
        return job.expires_at is not None and job.expires_at <= self.clock.now

    def due(self, stages: Sequence[Stage]) -> list[Expected]:
        """Return the ready jobs at these stages."""
        queued = [job for job in self.expected.values() if job.status is State.QUEUED and job.stage in stages]
        return [job for job in queued if not job.scheduled]

    def best(self, stages: Sequence[Stage]) -> Expected | None:
        """Return the job that a worker of these stages must claim."""
        order = {Stage.GENERATE: 0, Stage.ENCODE: 1}
        return min(self.due(stages), key=lambda job: (-job.priority, order[job.stage], job.id), default=None)

    def holder(self, lease: Lease) -> Expected | None:
        """Return the job for which the lease is still valid."""
        job = self.expected[lease.job_id]
        return job if job.lease == lease else None


def compare(row: Job, job: Expected) -> None:
    """Check that the row is as expected, and that there is a queue entry exactly while the job is active."""
    assert (row.status, row.attempt, row.stage) == (job.status, job.attempt, job.stage)
    assert (row.cancel_requested_at is not None) == job.cancel_requested
    assert row.expires_at == job.expires_at
    assert (row.entry is None) == (job.status in TERMINAL)
    assert (row.stored_status == State.QUEUED) == (row.entry is not None)
    if row.entry is None:
        return
    entry = row.entry
    assert (entry.owner, entry.priority, entry.position) == (row.owner, row.priority, row.id)
    assert (entry.attempts_left, entry.isolated, entry.scheduled) == (job.attempts_left, job.isolated, job.scheduled)
    assert entry.lease_token == (job.lease.token if job.lease else None)
    assert entry.lease_until == job.lease_until
    assert (entry.available_at, entry.notified_at) == (job.available_at, job.notified_at)
    assert entry.embedding_attempt == job.embedding_attempt
    if entry.status == State.QUEUED:
        assert entry.attempts_left > 0
        assert entry.cancel_requested_at is None


def possible_states(history: Sequence[str]) -> set[State]:
    """Return the states that TRANSITIONS allow after these events; empty if the events are not allowed."""
    here = {State.QUEUED} if history[0] == "queued" else set[State]()
    for event in history[1:]:
        if event == "cancel_requested":
            here &= {State.RUNNING}
        else:
            here = {way.target for way in TRANSITIONS if way.event == event and way.sources & here}
    return here


def play(database: Database, clock: Clock, examples: int, steps: int) -> None:
    run_state_machine_as_test(
        lambda: JobMachine(database, clock), settings=settings(max_examples=examples, stateful_step_count=steps)
    )


def test_random_histories_follow_the_transition_table_on_sqlite(sqlite: Database, clock: Clock) -> None:
    play(sqlite, clock, examples=80, steps=30)


def test_random_histories_follow_the_transition_table_on_postgresql(postgresql: Database, clock: Clock) -> None:
    play(postgresql, clock, examples=8, steps=25)


def test_a_history_outside_the_transition_table_is_detected() -> None:
    assert possible_states(["queued", "claimed", "succeeded"]) == {State.SUCCEEDED}
    assert possible_states(["queued", "succeeded"]) == set()
    assert possible_states(["queued", "claimed", "succeeded", "retried"]) == set()
    assert possible_states(["queued", "claimed", "encoded", "claimed", "succeeded"]) == {State.SUCCEEDED}
    assert possible_states(["queued", "encoded"]) == set()
    assert possible_states(["claimed"]) == set()

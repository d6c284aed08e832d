"""The record of webhook deliveries: due events, claims and retries."""

import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import pytest

from tests.integration.jobs.examples import HOOK, Clock, cancel, claim, complete, job_in, stored_image, submit
from zcore.errors import NotFound
from zcore.jobs import queries, webhooks
from zcore.jobs.database import Database
from zcore.jobs.models import WebhookAttempt, WebhookEvent
from zcore.jobs.states import State
from zcore.jobs.webhooks import AttemptOutcome, DueWebhook

HOLD_S = 60.0
DELIVERED = AttemptOutcome(delivered=True, status_code=204, response_body="", duration_ms=12, retry_in_s=None)
REFUSED = AttemptOutcome(delivered=False, status_code=500, response_body="later", duration_ms=9, retry_in_s=300.0)
GIVEN_UP = AttemptOutcome(delivered=False, status_code=None, response_body="no route", duration_ms=3, retry_in_s=None)


def claim_due(database: Database, limit: int = 10) -> list[DueWebhook]:
    with database.write() as transaction:
        return webhooks.claim_due(transaction, limit, HOLD_S)


def record(database: Database, webhook: DueWebhook, outcome: AttemptOutcome) -> None:
    with database.write() as transaction:
        webhooks.record_attempt(transaction, webhook, outcome)


def delivery(database: Database, job_id: uuid.UUID) -> tuple[WebhookEvent, list[WebhookAttempt]]:
    """Return the job's only webhook event and its attempts."""
    with database.read() as transaction:
        [(event, attempts)] = queries.timeline(transaction, job_id).webhooks
    return event, list(attempts)


def due_at(database: Database, job_id: uuid.UUID) -> datetime | None:
    return delivery(database, job_id)[0].next_attempt_at


def canceled(database: Database) -> uuid.UUID:
    """Return a canceled job with a due webhook event."""
    return cancel(database, submit(database, webhook_url=HOOK).id).id


def test_a_due_event_contains_everything_to_deliver(database: Database, clock: Clock) -> None:
    job = submit(database, webhook_url=HOOK, metadata={"order": 7}, n=2)
    complete(database, claim(database), [stored_image(0), stored_image(1)])
    [due] = claim_due(database)
    assert (due.type, due.url, due.attempt, due.created_at) == ("job.succeeded", HOOK, 1, clock.now)
    assert due.snapshot["id"] == str(job.id)
    assert due.output_keys == {0: stored_image(0).key, 1: stored_image(1).key}


def test_a_late_delivery_omits_images_that_were_deleted(database: Database, clock: Clock) -> None:
    job_in(State.EXPIRED, database, clock, webhook_url=HOOK)
    [due] = claim_due(database)
    assert due.type == "job.succeeded"
    assert due.output_keys == {}


def test_a_held_event_is_not_due(database: Database, clock: Clock) -> None:
    canceled(database)
    assert len(claim_due(database)) == 1
    assert claim_due(database) == []
    clock.advance(HOLD_S - 0.001)
    assert claim_due(database) == []


def test_an_event_held_by_a_dead_process_is_due_again(database: Database, clock: Clock) -> None:
    canceled(database)
    [first] = claim_due(database)
    clock.advance(HOLD_S)
    [again] = claim_due(database)
    assert (again.id, again.attempt) == (first.id, 2)


def test_the_longest_due_events_are_claimed_first_up_to_the_limit(database: Database, clock: Clock) -> None:
    jobs = []
    for _ in range(3):
        jobs.append(canceled(database))
        clock.advance(1)
    assert [due.snapshot["id"] for due in claim_due(database, limit=1)] == [str(jobs[0])]
    assert {due.snapshot["id"] for due in claim_due(database)} == {str(job_id) for job_id in jobs[1:]}


def test_a_delivered_event_is_not_due_again(database: Database, clock: Clock) -> None:
    job_id = canceled(database)
    [due] = claim_due(database)
    record(database, due, DELIVERED)
    clock.advance(HOLD_S * 1000)
    assert claim_due(database) == []
    event, [attempt] = delivery(database, job_id)
    assert event.delivered_at is not None
    assert (attempt.number, attempt.status_code, attempt.duration_ms) == (1, 204, 12)


def test_a_refused_event_is_due_again_on_schedule(database: Database, clock: Clock) -> None:
    job_id = canceled(database)
    [due] = claim_due(database)
    record(database, due, REFUSED)
    clock.advance(299)
    assert claim_due(database) == []
    clock.advance(1)
    [again] = claim_due(database)
    assert again.attempt == 2
    record(database, again, DELIVERED)
    assert [attempt.status_code for attempt in delivery(database, job_id)[1]] == [500, 204]


def test_an_event_that_was_given_up_is_due_again_only_after_resend(database: Database, clock: Clock) -> None:
    job_id = canceled(database)
    [due] = claim_due(database)
    record(database, due, GIVEN_UP)
    clock.advance(HOLD_S * 1000)
    assert claim_due(database) == []
    assert due_at(database, job_id) is None
    with database.write() as transaction:
        webhooks.resend(transaction, due.job_id, due.id)
    assert [again.attempt for again in claim_due(database)] == [1]


def test_a_delivered_event_can_be_resent(database: Database) -> None:
    canceled(database)
    [due] = claim_due(database)
    record(database, due, DELIVERED)
    with database.write() as transaction:
        webhooks.resend(transaction, due.job_id, due.id)
    assert [again.id for again in claim_due(database)] == [due.id]


def test_a_late_failure_does_not_undo_a_resend(database: Database) -> None:
    job_id = canceled(database)
    [due] = claim_due(database)
    with database.write() as transaction:
        webhooks.resend(transaction, due.job_id, due.id)
    record(database, due, GIVEN_UP)
    event, attempts = delivery(database, job_id)
    assert event.next_attempt_at is not None
    assert len(attempts) == 1


def test_resending_an_unknown_event_is_refused(database: Database) -> None:
    with pytest.raises(NotFound), database.write() as transaction:
        webhooks.resend(transaction, uuid.uuid4(), uuid.uuid4())


def test_a_late_refusal_does_not_undo_a_delivery(database: Database, clock: Clock) -> None:
    job_id = canceled(database)
    [slow] = claim_due(database)
    clock.advance(HOLD_S)
    [quick] = claim_due(database)
    record(database, quick, DELIVERED)
    record(database, slow, REFUSED)
    event, attempts = delivery(database, job_id)
    assert event.delivered_at is not None
    assert event.next_attempt_at is None
    assert len(attempts) == 2


@pytest.mark.timeout(120)
def test_concurrent_claims_share_the_due_events_without_duplicates(database: Database) -> None:
    for _ in range(24):
        canceled(database)
    barrier = threading.Barrier(6)

    def drain(_: int) -> list[uuid.UUID]:
        barrier.wait()
        taken: list[uuid.UUID] = []
        while due := claim_due(database, limit=3):
            taken += [one.id for one in due]
        return taken

    with ThreadPoolExecutor(6) as pool:
        taken = [one for part in pool.map(drain, range(6)) for one in part]
    assert len(taken) == len(set(taken)) == 24

"""The record of deliveries: what is due, who holds it, and when it is due again."""

import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import pytest

from tests.integration.jobs.examples import HOOK, Clock, cancel, claim, complete, job_in, picture, submit
from zcore.errors import NotFound
from zcore.jobs import queries, webhooks
from zcore.jobs.database import Database
from zcore.jobs.models import WebhookAttempt, WebhookEvent
from zcore.jobs.states import State
from zcore.jobs.webhooks import AttemptOutcome, DueWebhook

HOLD_S = 60.0
TAKEN = AttemptOutcome(delivered=True, status_code=204, answer="", duration_ms=12, retry_in_s=None)
REFUSED = AttemptOutcome(delivered=False, status_code=500, answer="later", duration_ms=9, retry_in_s=300.0)
DEAD = AttemptOutcome(delivered=False, status_code=None, answer="no route", duration_ms=3, retry_in_s=None)


def claim_due(database: Database, at_most: int = 10) -> list[DueWebhook]:
    with database.write() as transaction:
        return webhooks.claim_due(transaction, at_most, HOLD_S)


def record(database: Database, webhook: DueWebhook, outcome: AttemptOutcome) -> None:
    with database.write() as transaction:
        webhooks.record_attempt(transaction, webhook, outcome)


def delivery(database: Database, job_id: uuid.UUID) -> tuple[WebhookEvent, list[WebhookAttempt]]:
    """The job's only webhook event with its tries."""
    with database.read() as transaction:
        [(event, tries)] = queries.timeline(transaction, job_id).webhooks
    return event, list(tries)


def due_at(database: Database, job_id: uuid.UUID) -> datetime | None:
    return delivery(database, job_id)[0].next_attempt_at


def canceled(database: Database) -> uuid.UUID:
    """A job whose caller has to be told."""
    return cancel(database, submit(database, webhook_url=HOOK).id).id


def test_what_is_due_comes_with_all_that_has_to_be_told(database: Database, clock: Clock) -> None:
    job = submit(database, webhook_url=HOOK, metadata={"order": 7}, n=2)
    complete(database, claim(database), [picture(0), picture(1)])
    [due] = claim_due(database)
    assert (due.type, due.url, due.attempt, due.created_at) == ("job.succeeded", HOOK, 1, clock.now)
    assert due.snapshot["id"] == str(job.id)
    assert due.output_keys == {0: picture(0).key, 1: picture(1).key}


def test_what_is_told_late_names_no_pictures_that_were_deleted(database: Database, clock: Clock) -> None:
    job_in(State.EXPIRED, database, clock, webhook_url=HOOK)
    [due] = claim_due(database)
    assert due.type == "job.succeeded"
    assert due.output_keys == {}


def test_nothing_is_due_twice_while_it_is_held(database: Database, clock: Clock) -> None:
    canceled(database)
    assert len(claim_due(database)) == 1
    assert claim_due(database) == []
    clock.advance(HOLD_S - 0.001)
    assert claim_due(database) == []


def test_what_a_dead_deliverer_held_is_due_again(database: Database, clock: Clock) -> None:
    canceled(database)
    [first] = claim_due(database)
    clock.advance(HOLD_S)
    [again] = claim_due(database)
    assert (again.id, again.attempt) == (first.id, 2)


def test_what_has_waited_longest_is_due_first_and_no_more_than_asked_for(database: Database, clock: Clock) -> None:
    jobs = []
    for _ in range(3):
        jobs.append(canceled(database))
        clock.advance(1)
    assert [due.snapshot["id"] for due in claim_due(database, at_most=1)] == [str(jobs[0])]
    assert {due.snapshot["id"] for due in claim_due(database)} == {str(job_id) for job_id in jobs[1:]}


def test_what_was_taken_is_never_due_again(database: Database, clock: Clock) -> None:
    job_id = canceled(database)
    [due] = claim_due(database)
    record(database, due, TAKEN)
    clock.advance(HOLD_S * 1000)
    assert claim_due(database) == []
    event, [attempt] = delivery(database, job_id)
    assert event.delivered_at is not None
    assert (attempt.number, attempt.status_code, attempt.duration_ms) == (1, 204, 12)


def test_what_was_refused_is_due_again_by_schedule(database: Database, clock: Clock) -> None:
    job_id = canceled(database)
    [due] = claim_due(database)
    record(database, due, REFUSED)
    clock.advance(299)
    assert claim_due(database) == []
    clock.advance(1)
    [again] = claim_due(database)
    assert again.attempt == 2
    record(database, again, TAKEN)
    assert [attempt.status_code for attempt in delivery(database, job_id)[1]] == [500, 204]


def test_a_dead_event_is_due_again_only_by_hand(database: Database, clock: Clock) -> None:
    job_id = canceled(database)
    [due] = claim_due(database)
    record(database, due, DEAD)
    clock.advance(HOLD_S * 1000)
    assert claim_due(database) == []
    assert due_at(database, job_id) is None
    with database.write() as transaction:
        webhooks.resend(transaction, due.id)
    assert [again.attempt for again in claim_due(database)] == [1]


def test_a_delivered_event_can_be_sent_once_more(database: Database) -> None:
    canceled(database)
    [due] = claim_due(database)
    record(database, due, TAKEN)
    with database.write() as transaction:
        webhooks.resend(transaction, due.id)
    assert [again.id for again in claim_due(database)] == [due.id]


def test_a_late_failure_does_not_take_back_what_was_asked_for_since(database: Database) -> None:
    job_id = canceled(database)
    [due] = claim_due(database)
    with database.write() as transaction:
        webhooks.resend(transaction, due.id)
    record(database, due, DEAD)
    event, tries = delivery(database, job_id)
    assert event.next_attempt_at is not None
    assert len(tries) == 1


def test_only_an_event_that_is_there_can_be_sent_again(database: Database) -> None:
    with pytest.raises(NotFound), database.write() as transaction:
        webhooks.resend(transaction, uuid.uuid4())


def test_a_late_refusal_does_not_undo_a_delivery(database: Database, clock: Clock) -> None:
    job_id = canceled(database)
    [slow] = claim_due(database)
    clock.advance(HOLD_S)
    [quick] = claim_due(database)
    record(database, quick, TAKEN)
    record(database, slow, REFUSED)
    event, tries = delivery(database, job_id)
    assert event.delivered_at is not None
    assert event.next_attempt_at is None
    assert len(tries) == 2


@pytest.mark.timeout(120)
def test_many_deliverers_share_what_is_due_and_post_nothing_twice(database: Database) -> None:
    for _ in range(24):
        canceled(database)
    barrier = threading.Barrier(6)

    def drain(_: int) -> list[uuid.UUID]:
        barrier.wait()
        taken: list[uuid.UUID] = []
        while due := claim_due(database, at_most=3):
            taken += [one.id for one in due]
        return taken

    with ThreadPoolExecutor(6) as pool:
        taken = [one for part in pool.map(drain, range(6)) for one in part]
    assert len(taken) == len(set(taken)) == 24

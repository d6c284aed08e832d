"""The observer: what must hold after any run, each rule a function from the facts to the violations that it finds."""

import signal
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests.chaos.facts import Facts, Kind, Sample
from worker.app import BROKEN_STATUS
from zcore.jobs.states import TERMINAL, TRANSITIONS, State

LONGEST_REQUEST_S = 70.0
MAX_BEGUN = 100
GUILTY_CODES = {Kind.KILLS: {"poison"}, Kind.RAISES: {"internal_error"}}
# A process may warm up; what it has after its first quarter is compared with its last quarter.
MIN_SAMPLES = 24
GROWTH = 1.25
STEADY = 0.25
"""The smallest share of the growth in either half of that time."""
SPARE = {"rss_bytes": 32 * 2**20, "descriptors": 12, "threads": 8, "sockets": 12}


@dataclass(frozen=True)
class Violation:
    """A broken rule, and by what."""

    rule: str
    what: str


def violations(facts: Facts) -> list[Violation]:
    """Return everything that breaks a rule."""
    return [Violation(rule.__name__, what) for rule in RULES for what in rule(facts)]


def every_accepted_job_ends(facts: Facts) -> Iterator[str]:
    """An accepted job is in the database, in a terminal state."""
    for job in facts.accepted:
        row = facts.jobs.get(job.job_id)
        if row is None:
            yield f"{job.job_id} was accepted and is gone"
        elif row.status not in TERMINAL:
            yield f"{job.job_id} is still {row.status}: {_history(facts, job.job_id)}"


def each_submission_makes_one_job(facts: Facts) -> Iterator[str]:
    """One Idempotency-Key is one job, and no job exists whose id no caller got."""
    ids = defaultdict[str, set[str]](set)
    for job in facts.accepted:
        ids[job.key].add(job.job_id)
    for key, jobs in ids.items():
        if len(jobs) > 1:
            yield f"key {key} made the jobs {sorted(jobs)}"
    for job_id in facts.jobs.keys() - {job.job_id for job in facts.accepted}:
        yield f"{job_id} exists, and its submission was never answered"


def innocent_jobs_succeed(facts: Facts) -> Iterator[str]:
    """A job that does no harm succeeds, or is canceled because its caller requested it."""
    for job in facts.accepted:
        row = facts.jobs.get(job.job_id)
        if row is None or not job.kind.is_innocent or row.status == State.SUCCEEDED:
            continue
        if row.status == State.FAILED:
            yield f"{job.job_id} ({job.kind}) failed: {row.error_code}: {_history(facts, job.job_id)}"
        elif row.status == State.CANCELED and job.job_id not in facts.cancellations:
            yield f"{job.job_id} was canceled, and nobody requested it"


def guilty_jobs_fail_as_such(facts: Facts) -> Iterator[str]:
    """A job that breaks its worker in every attempt fails, unless its caller cancels it, and its error says why."""
    for job in facts.accepted:
        row = facts.jobs.get(job.job_id)
        if row is None or row.status not in TERMINAL or job.kind.is_innocent:
            continue
        if row.status == State.CANCELED and job.job_id in facts.cancellations:
            continue
        if row.status != State.FAILED or row.error_code not in GUILTY_CODES[job.kind]:
            yield f"{job.job_id} ({job.kind}) ended {row.status}: {row.error_code}: {_history(facts, job.job_id)}"


def a_success_has_exactly_its_images(facts: Facts) -> Iterator[str]:
    """A succeeded job has the n images it asked for, each readable and with the bytes that the row states."""
    for job in facts.accepted:
        row, outputs = facts.jobs.get(job.job_id), facts.outputs.get(job.job_id, ())
        if row is None:
            continue
        expected = list(range(job.images)) if row.status == State.SUCCEEDED else []
        if sorted(output.position for output in outputs) != expected:
            yield f"{job.job_id} is {row.status} with images {[output.position for output in outputs]}, not {expected}"
        for output in outputs:
            if facts.objects.get(output.key) != output.sha256:
                yield f"{output.key} is {'another file' if output.key in facts.objects else 'missing'}"
    for job_id, same in facts.downloads:
        if not same:
            yield f"{job_id}: the image behind its link is not the one that the API described"


def objects_equal_rows(facts: Facts) -> Iterator[str]:
    """After maintenance, every object in the bucket belongs to a row."""
    named = {output.key for outputs in facts.outputs.values() for output in outputs} | facts.uploads
    for key in sorted(facts.objects.keys() - named):
        job_id = key.split("/")[1] if key.startswith("jobs/") else ""
        yield f"{key} has no row{': ' + _history(facts, job_id) if job_id else ''}"
    for key in sorted(facts.uploads - facts.objects.keys()):
        yield f"the upload {key} has no object"


def attempts_are_bounded(facts: Facts) -> Iterator[str]:
    """A job that breaks its worker begins its budget of attempts and one more, in company; no job begins without end.

    An attempt that a worker hands back is not charged, nor one whose worker was lost beside a job that only raises.
    """
    for job in facts.accepted:
        counted = Counter(facts.events.get(job.job_id, ()))
        free = counted["released"] + (counted["rescued"] if job.kind is Kind.RAISES else 0)
        limit = MAX_BEGUN if job.kind.is_innocent else facts.max_attempts + 1 + free
        if counted["claimed"] > limit:
            yield f"{job.job_id} ({job.kind}) began {counted['claimed']} attempts: {_history(facts, job.job_id)}"


def timelines_follow_the_transition_table(facts: Facts) -> Iterator[str]:
    """Every event of a job is allowed in the state that the event before it led to; the first, in QUEUED."""
    for job_id, events in facts.events.items():
        state = State.QUEUED
        for event in events:
            allowed = [transition for transition in TRANSITIONS if transition.event == event]
            reached = [transition.target for transition in allowed if state in transition.sources]
            if allowed and not reached:
                yield f"{job_id}: {event} while {state}: {_history(facts, job_id)}"
                break
            state = reached[0] if allowed else state


def terminal_states_never_change(facts: Facts) -> Iterator[str]:
    """Whoever has seen a job ended sees the same end ever after; its timeline has one end."""
    ends: dict[str, str] = {}
    for seen in facts.seen:
        before = ends.get(seen.job_id)
        if before is not None and seen.status != before:
            yield f"{seen.job_id} was seen {before}, and later {seen.status}"
        elif before is None and seen.status in TERMINAL:
            ends[seen.job_id] = seen.status
    for job_id, row in facts.jobs.items():
        if ends.get(job_id, row.status) != row.status:
            yield f"{job_id} was seen {ends[job_id]}, and at the end {row.status}"
    ending = {transition.event for transition in TRANSITIONS if transition.target in TERMINAL}
    for job_id, events in facts.events.items():
        found = [event for event in events if event in ending]
        if len(found) > 1 or (found and events[-1] != found[0]):
            yield f"{job_id} goes on after its end: {' '.join(events)}"


def every_webhook_arrives_under_one_id(facts: Facts) -> Iterator[str]:
    """An ended job with a webhook has one event, which arrived at least once, signed, and says how the job ended."""
    arrived = defaultdict[str, list[str]](list)
    for delivery in facts.deliveries:
        arrived[delivery.job_id].append(delivery.webhook_id)
        row = facts.jobs.get(delivery.job_id)
        if not delivery.signed:
            yield f"a webhook of {delivery.job_id} has a wrong signature"
        if row is None or delivery.type != f"job.{row.status}":
            yield f"{delivery.job_id} is {row.status if row else 'gone'}, and its webhook says {delivery.type}"
    for job in facts.accepted:
        row = facts.jobs.get(job.job_id)
        if row is None or row.status not in TERMINAL:
            continue
        ids, recorded = set(arrived[job.job_id]), list(facts.webhook_ids.get(job.job_id, ()))
        if not job.webhook and (ids or recorded):
            yield f"{job.job_id} asked for no webhook and has {len(ids)}"
        if job.webhook and (len(recorded) != 1 or ids != set(recorded)):
            yield f"{job.job_id}: events {recorded}, arrived {sorted(ids)}"


def errors_are_503_and_say_so(facts: Facts) -> Iterator[str]:
    """The only error of the service's own is 503 as problem+json."""
    found = Counter(
        f"{answer.route}: {answer.status} {answer.media_type} {answer.detail}"
        for answer in facts.answers
        if answer.status >= 500 and (answer.status != 503 or answer.media_type != "application/problem+json")
    )
    for what, count in found.items():
        yield f"{what} ({count} times)"


def well_formed_requests_are_not_refused(facts: Facts) -> Iterator[str]:
    """No request of these callers is answered 4xx, but 429."""
    found = Counter(
        f"{answer.route}: {answer.status} {answer.detail}"
        for answer in facts.answers
        if 400 <= answer.status < 500 and answer.status != 429
    )
    for what, count in found.items():
        yield f"{what} ({count} times)"


def no_request_takes_longer_than_70_s(facts: Facts) -> Iterator[str]:
    """Every request is answered, or its connection ends, in time."""
    for answer in facts.answers:
        if answer.took_s > LONGEST_REQUEST_S:
            yield f"{answer.route}: {answer.status} after {answer.took_s:.0f} s"


def processes_end_only_when_ended(facts: Facts) -> Iterator[str]:
    """No process ends by itself, but a worker in which a job killed it, or several jobs crashed."""
    kinds = {job.kind for job in facts.accepted}
    allowed = {-signal.SIGKILL} if Kind.KILLS in kinds else set[int]()
    allowed |= {BROKEN_STATUS} if Kind.RAISES in kinds else set()
    for name, status in facts.unexpected_ends:
        if not (name.startswith("worker") and status in allowed):
            yield f"{name} ended with status {status}"


def resources_stay_flat(facts: Facts) -> Iterator[str]:
    """Memory, descriptors, threads and sockets of a process do not go on growing.

    A step is not a leak: an API gets the connections of all callers at once when the other one ends.
    """
    series = defaultdict[tuple[str, int], list[Sample]](list)
    for sample in facts.samples:
        series[sample.process, sample.pid].append(sample)
    for (name, pid), samples in series.items():
        if len(samples) < MIN_SAMPLES:
            continue
        quarter = len(samples) // 4
        for resource, spare in SPARE.items():
            values = [int(getattr(sample, resource)) for sample in samples]
            before, between, after = (
                statistics.median_low(values[start : start + quarter])
                for start in (quarter, 2 * quarter, len(values) - quarter)
            )
            goes_on = min(between - before, after - between) > STEADY * (after - before)
            if after > before * GROWTH + spare and goes_on:
                yield f"{name} ({pid}): {resource} grew from {before:.0f} to {after:.0f}"


def _history(facts: Facts, job_id: str) -> str:
    return " ".join(facts.events.get(job_id, ()))


RULES: tuple[Callable[[Facts], Iterator[str]], ...] = (
    every_accepted_job_ends,
    each_submission_makes_one_job,
    innocent_jobs_succeed,
    guilty_jobs_fail_as_such,
    a_success_has_exactly_its_images,
    objects_equal_rows,
    attempts_are_bounded,
    timelines_follow_the_transition_table,
    terminal_states_never_change,
    every_webhook_arrives_under_one_id,
    errors_are_503_and_say_so,
    well_formed_requests_are_not_refused,
    no_request_takes_longer_than_70_s,
    processes_end_only_when_ended,
    resources_stay_flat,
)

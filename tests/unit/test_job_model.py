"""Every interleaving of one job, two workers, maintenance, its caller and the delivery of its webhook, searched whole.

The model is small and its steps are those of `zcore.jobs.states`: a transition that the model does not take, or takes
from another state, fails here. It shows what the random histories of `tests/integration/jobs/test_job_machine.py` can
only sample, and which rule of `zcore/jobs/README.md` each promise rests on: without the rule, the search finds a
history that breaks the promise.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from zcore.jobs import states
from zcore.jobs.states import TERMINAL, TRANSITIONS, State, Transition

ATTEMPTS = 2
DELIVERIES = 2
RETRIES = 1
SUCCESSES = {transition.verb for transition in TRANSITIONS if transition.target is State.SUCCEEDED}
RULES = (
    "writes name the token",
    "a claim makes a new token",
    "only an expired lease is rescued",
    "a transition has sources",
    "an end writes its webhook event",
    "a lone death is charged",
    "a delivery is recorded after it was sent",
)


class Job(NamedTuple):
    """All that matters of a job: its row, what its two workers believe, and its webhook event."""

    status: State = State.QUEUED
    token: int = 0
    expired: bool = False
    left: int = ATTEMPTS
    charged: int = 0
    isolated: bool = False
    cancel_requested: bool = False
    retries: int = 0
    held: tuple[int, int] = (0, 0)
    """The token of each worker that believes it has the job."""
    unheard_ends: int = 0
    """Ends whose webhook event is not written."""
    due: bool = False
    sending: bool = False
    sent: bool = False
    deliveries: int = 0
    delivered: bool = False


class Step(NamedTuple):
    """One step: its name, whether it needs no bad luck, and where it leads."""

    name: str
    fair: bool
    after: Job


class Model:
    """The steps of a job under all rules but the ones in `broken`."""

    def __init__(self, *broken: str) -> None:
        assert set(broken) <= set(RULES)
        self._broken = broken

    def steps(self, job: Job) -> Iterator[Step]:
        """Yield every step that may come next."""
        yield from self._of_workers(job)
        yield from self._of_maintenance(job)
        yield from self._of_the_caller(job)
        yield from self._of_the_webhook(job)

    def _holds(self, rule: str) -> bool:
        return rule not in self._broken

    def _move(self, job: Job, transition: Transition, fair: bool = False, **changes: Any) -> Iterator[Step]:
        """Yield the transition, if it starts from the job's state; every end of an attempt gives up the lease."""
        if self._holds("a transition has sources") and job.status not in transition.sources:
            return
        values: dict[str, Any] = {"status": transition.target, "token": 0, "expired": False, **changes}
        if transition.target in TERMINAL and transition.notifies:
            written = self._holds("an end writes its webhook event")
            values |= {"due": written, "unheard_ends": job.unheard_ends + (not written)}
            values |= {"sent": False, "delivered": False, "deliveries": 0}
        yield Step(transition.verb, fair, job._replace(**values))

    def _of_workers(self, job: Job) -> Iterator[Step]:
        for worker, token in enumerate(job.held):
            if token == 0:
                yield from self._claim(job, worker)
                continue
            idle = self._held(job, worker, 0)
            yield Step("die", False, job._replace(held=idle))
            if token == job.token or not self._holds("writes name the token"):
                yield Step("heartbeat", False, job._replace(expired=False))
                yield from self._end(job, idle)
            else:
                yield Step("notice the loss", True, job._replace(held=idle))

    def _claim(self, job: Job, worker: int) -> Iterator[Step]:
        unused = next(token for token in (1, 2, 3) if token not in job.held)
        token = unused if self._holds("a claim makes a new token") else 1
        if job.status is State.QUEUED and job.left > 0:
            changes: dict[str, Any] = {"token": token, "left": job.left - 1, "charged": job.charged + 1}
            yield from self._move(job, states.CLAIM, fair=True, held=self._held(job, worker, token), **changes)

    def _end(self, job: Job, held: tuple[int, int]) -> Iterator[Step]:
        """Yield every end of an attempt by its worker. What a worker ends while its job is canceled is canceled."""
        given_back: dict[str, Any] = {"left": job.left + 1, "charged": job.charged - 1}
        yield from self._move(job, states.COMPLETE, fair=True, held=held)
        if job.cancel_requested:
            yield from self._move(job, states.CANCEL_RUNNING, held=held)
            return
        yield from self._move(job, states.FAIL, held=held)
        if job.left > 0:
            yield from self._move(job, states.SCHEDULE_RETRY, held=held)
            yield from self._move(job, states.REENCODE, held=held)
        yield from self._move(job, states.RELEASE, held=held, **given_back)
        yield from self._move(job, states.COMPLETE_ENCODING, held=held, **given_back)

    def _of_maintenance(self, job: Job) -> Iterator[Step]:
        if job.status is State.RUNNING and not job.expired:
            yield Step("time passes", job.token not in job.held, job._replace(expired=True))
        if job.status is State.RUNNING and (job.expired or not self._holds("only an expired lease is rescued")):
            fair = job.token not in job.held
            if job.cancel_requested:
                yield from self._move(job, states.CANCEL_RUNNING, fair)
            elif not (job.isolated and self._holds("a lone death is charged")):
                given_back: dict[str, Any] = {"left": job.left + 1, "charged": job.charged - 1}
                yield from self._move(job, states.RESCUE, fair, isolated=True, **given_back)
            elif job.left > 0:
                yield from self._move(job, states.RESCUE, fair)
            else:
                yield from self._move(job, states.ABANDON, fair)
        yield from self._move(job, states.EXPIRE)

    def _of_the_caller(self, job: Job) -> Iterator[Step]:
        yield from self._move(job, states.CANCEL_QUEUED)
        if job.status is State.RUNNING and not job.cancel_requested:
            yield Step("request cancellation", False, job._replace(cancel_requested=True))
        if job.retries < RETRIES and not job.due and not job.sending:
            fresh: dict[str, Any] = {"left": ATTEMPTS, "charged": 0, "isolated": False, "cancel_requested": False}
            yield from self._move(job, states.RETRY, retries=job.retries + 1, **fresh)

    def _of_the_webhook(self, job: Job) -> Iterator[Step]:
        early = not self._holds("a delivery is recorded after it was sent")
        if job.due and not job.sending and not job.delivered:
            yield Step("claim the webhook", True, job._replace(sending=True, delivered=early))
        if job.sending:
            last = job.deliveries + 1 == DELIVERIES
            done = {"sending": False, "deliveries": job.deliveries + 1, "sent": True}
            yield Step("deliver", True, job._replace(due=False, delivered=True, **done))
            yield Step("be refused", False, job._replace(due=not last, **done))
            yield Step("the deliverer dies", False, job._replace(sending=False, due=not job.delivered))

    def _held(self, job: Job, worker: int, token: int) -> tuple[int, int]:
        return (token, job.held[1]) if worker == 0 else (job.held[0], token)


def reachable(model: Model) -> dict[Job, list[Step]]:
    """Return every state that a new job can reach, with the steps that lead on from it."""
    found: dict[Job, list[Step]] = {}
    ahead = [Job()]
    while ahead:
        job = ahead.pop()
        if job not in found:
            found[job] = list(model.steps(job))
            ahead += [step.after for step in found[job]]
    return found


def broken_promises(model: Model) -> set[str]:
    """Return the promises that some history of the model breaks."""
    graph = reachable(model)
    found = {promise for job in graph for promise in _broken_by(job)}
    found |= {promise for job, steps in graph.items() for step in steps for promise in _broken_by_step(job, step)}
    if not _all_end(graph, lambda step: step.fair):
        found.add("with luck every job ends, and its webhook is sent")
    if not _all_end(graph, lambda step: (step.fair and step.name not in SUCCESSES) or step.name == "die"):
        found.add("a job that kills every worker ends")
    return found


def _broken_by(job: Job) -> Iterator[str]:
    if job.token and sum(held == job.token for held in job.held) > 1:
        yield "no two workers hold a valid token"
    if not 0 <= job.charged <= ATTEMPTS:
        yield "charged attempts are bounded"
    if job.unheard_ends:
        yield "every end has its webhook event"
    if job.delivered and not job.due and not job.sending and not job.sent:
        yield "a webhook is sent before it counts as delivered"


def _broken_by_step(job: Job, step: Step) -> Iterator[str]:
    after = step.after
    if job.status in TERMINAL and after.status is not job.status and step.name not in ("retry", "expire"):
        yield "a terminal state changes only by retry and expiry"
    in_time = job.token and not job.expired and job.token in job.held
    if in_time and after.token != job.token and job.token in after.held:
        yield "no one takes a job from a worker in time"


def _all_end(graph: dict[Job, list[Step]], taken: Callable[[Step], bool]) -> bool:
    """Return whether every path of these steps comes to an end, and each at a terminal state without a due webhook."""
    ahead = {job: {step.after for step in steps if taken(step)} for job, steps in graph.items()}
    if any(not after and (job.status not in TERMINAL or job.due) for job, after in ahead.items()):
        return False
    before = defaultdict[Job, list[Job]](list)
    for job, after in ahead.items():
        for next_job in after:
            before[next_job].append(job)
    open_paths = {job: len(after) for job, after in ahead.items()}
    ended = [job for job, count in open_paths.items() if count == 0]
    for job in ended:  # it grows
        for earlier in before[job]:
            open_paths[earlier] -= 1
            if open_paths[earlier] == 0:
                ended.append(earlier)
    return len(ended) == len(graph)


@pytest.fixture(scope="module")
def graph() -> dict[Job, list[Step]]:
    return reachable(Model())


def test_no_history_breaks_a_promise() -> None:
    assert broken_promises(Model()) == set()


def test_the_model_takes_every_transition_from_exactly_its_sources(graph: dict[Job, list[Step]]) -> None:
    verbs = {transition.verb: transition for transition in TRANSITIONS}
    taken = {(step.name, job.status, step.after.status) for job, steps in graph.items() for step in steps}
    allowed = {(verb, source, found.target) for verb, found in verbs.items() for source in found.sources}
    assert {(name, source, target) for name, source, target in taken if name in verbs} == allowed
    assert not [(name, source) for name, source, target in taken if name not in verbs and source is not target]


@pytest.mark.parametrize(
    ("rule", "promise"),
    [
        ("writes name the token", "no one takes a job from a worker in time"),
        ("a claim makes a new token", "no two workers hold a valid token"),
        ("only an expired lease is rescued", "no one takes a job from a worker in time"),
        ("a transition has sources", "a terminal state changes only by retry and expiry"),
        ("an end writes its webhook event", "every end has its webhook event"),
        ("a lone death is charged", "a job that kills every worker ends"),
        ("a delivery is recorded after it was sent", "a webhook is sent before it counts as delivered"),
    ],
)
def test_without_a_rule_some_history_breaks_the_promise_that_rests_on_it(rule: str, promise: str) -> None:
    assert promise in broken_promises(Model(rule))

"""The states of a job and the transition table: the only changes of state that are allowed.

Does not depend on tables or sessions. `lifecycle`, `claims` and `recovery` carry the transitions out; the CHECK
constraints of `models` repeat what a row in each state must look like.
"""

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """State of a job. A cancellation request is a column, not a state."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"
    EXPIRED = "expired"


ACTIVE = frozenset({State.QUEUED, State.RUNNING})
TERMINAL = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELED, State.EXPIRED})


@dataclass(frozen=True, slots=True)
class Transition:
    """One allowed change of state: its verb, its source states, its target and the event it adds to the timeline."""

    verb: str
    sources: frozenset[State]
    target: State
    event: str
    description: str
    notifies: bool = False  # whether the caller's webhook is notified


def _from(source: State, target: State, verb: str, event: str, description: str, notifies: bool = False) -> Transition:
    return Transition(verb, frozenset({source}), target, event, description, notifies)


CLAIM = _from(State.QUEUED, State.RUNNING, "claim", "claimed", "a worker takes the job under a lease with a new token")
COMPLETE = _from(State.RUNNING, State.SUCCEEDED, "complete", "succeeded", "every image is stored", notifies=True)
FAIL = _from(
    State.RUNNING, State.FAILED, "fail", "failed", "the error is not retryable, or no attempts are left", notifies=True
)
SCHEDULE_RETRY = _from(
    State.RUNNING,
    State.QUEUED,
    "schedule_retry",
    "retry_scheduled",
    "the error is retryable; the job is tried again after a delay",
)
RELEASE = _from(
    State.RUNNING, State.QUEUED, "release", "released", "the worker is shutting down; the attempt is not counted"
)
COMPLETE_ENCODING = _from(
    State.RUNNING,
    State.QUEUED,
    "complete_encoding",
    "encoded",
    "the prompt's embedding is stored and generation comes next; the attempt is not counted",
)
REENCODE = _from(
    State.RUNNING,
    State.QUEUED,
    "reencode",
    "returned_to_encode",
    "the embedding is missing or does not fit, and this worker cannot encode prompts",
)
RESCUE = _from(
    State.RUNNING,
    State.QUEUED,
    "rescue",
    "rescued",
    "the lease expired: the worker is lost; the attempt is counted only if the job ran alone",
)
ABANDON = _from(
    State.RUNNING,
    State.FAILED,
    "abandon",
    "failed",
    "the lease expired while the job ran alone, and no attempts are left",
    notifies=True,
)
CANCEL_QUEUED = _from(
    State.QUEUED, State.CANCELED, "cancel_queued", "canceled", "the caller canceled the job", notifies=True
)
CANCEL_RUNNING = _from(
    State.RUNNING,
    State.CANCELED,
    "cancel_running",
    "canceled",
    "the worker saw the cancellation request, or was lost after it was made",
    notifies=True,
)
RETRY = Transition(
    "retry",
    frozenset({State.FAILED, State.CANCELED}),
    State.QUEUED,
    "retried",
    "requested explicitly; the job gets a new budget of attempts",
)
EXPIRE = _from(
    State.SUCCEEDED, State.EXPIRED, "expire", "expired", "the retention time is over; the images are deleted"
)

TRANSITIONS = (
    CLAIM, COMPLETE, FAIL, SCHEDULE_RETRY, RELEASE, COMPLETE_ENCODING, REENCODE, RESCUE, ABANDON, CANCEL_QUEUED,
    CANCEL_RUNNING, RETRY, EXPIRE,
)  # fmt: skip


def chart() -> str:
    """Return the transition table as a Mermaid state diagram. A test compares it with `zcore/jobs/README.md`."""
    lines = ["stateDiagram-v2", "    [*] --> queued: submit"]
    for transition in TRANSITIONS:
        lines += [f"    {source} --> {transition.target}: {transition.verb}" for source in sorted(transition.sources)]
    return "\n".join(lines)

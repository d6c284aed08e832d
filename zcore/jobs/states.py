"""The states of a job and the only ways between them: the law, printable.

Gives `State`, `TRANSITIONS` and `chart()`. Knows no table and no session: `lifecycle` carries the transitions out, the
CHECK constraints of `models` repeat what a row in each state must look like.
"""

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """Where a job stands. A wish to cancel is a column, not a state."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"
    EXPIRED = "expired"


TERMINAL = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELED, State.EXPIRED})


@dataclass(frozen=True, slots=True)
class Transition:
    """One way from a state to another: its verb, who may take it, and the event it leaves on the timeline."""

    verb: str
    sources: frozenset[State]
    target: State
    event: str
    meaning: str
    announces: bool = False  # whether the caller's webhook is told


def _one(verb: str, source: State, target: State, event: str, meaning: str, announces: bool = False) -> Transition:
    return Transition(verb, frozenset({source}), target, event, meaning, announces)


CLAIM = _one("claim", State.QUEUED, State.RUNNING, "claimed", "a worker takes the job with a lease and a token")
COMPLETE = _one("complete", State.RUNNING, State.SUCCEEDED, "succeeded", "every picture is stored", announces=True)
FAIL = _one(
    "fail",
    State.RUNNING,
    State.FAILED,
    "failed",
    "an error that a retry cannot mend, or no attempts left",
    announces=True,
)
POSTPONE = _one("postpone", State.RUNNING, State.QUEUED, "postponed", "a retryable error; tried again after a delay")
HAND_BACK = _one(
    "hand_back", State.RUNNING, State.QUEUED, "handed_back", "the worker is leaving; the attempt is not counted"
)
PASS_ON = _one(
    "pass_on",
    State.RUNNING,
    State.QUEUED,
    "encoded",
    "the prompt's embedding is stored and the pictures are due; the attempt is not counted",
)
REENCODE = _one(
    "reencode",
    State.RUNNING,
    State.QUEUED,
    "sent_to_encode",
    "there is no embedding, or none that fits, and this worker cannot make one",
)
RESCUE = _one("rescue", State.RUNNING, State.QUEUED, "rescued", "the lease ran out: the worker is gone")
ABANDON = _one(
    "abandon", State.RUNNING, State.FAILED, "failed", "the lease ran out, and no attempts are left", announces=True
)
CANCEL_QUEUED = _one(
    "cancel_queued", State.QUEUED, State.CANCELED, "canceled", "the caller wants it no more", announces=True
)
CANCEL_RUNNING = _one(
    "cancel_running",
    State.RUNNING,
    State.CANCELED,
    "canceled",
    "the worker saw the wish to cancel, or died with it",
    announces=True,
)
RETRY = Transition(
    "retry",
    frozenset({State.FAILED, State.CANCELED}),
    State.QUEUED,
    "retried",
    "asked for by hand; a fresh budget of attempts",
)
EXPIRE = _one("expire", State.SUCCEEDED, State.EXPIRED, "expired", "retention is over; the pictures are deleted")

TRANSITIONS = (
    CLAIM, COMPLETE, FAIL, POSTPONE, HAND_BACK, PASS_ON, REENCODE, RESCUE, ABANDON, CANCEL_QUEUED, CANCEL_RUNNING,
    RETRY, EXPIRE,
)  # fmt: skip


def chart() -> str:
    """The law as a Mermaid state diagram; `zcore/jobs/README.md` holds a copy that a test compares."""
    lines = ["stateDiagram-v2", "    [*] --> queued: submit"]
    for transition in TRANSITIONS:
        lines += [f"    {source} --> {transition.target}: {transition.verb}" for source in sorted(transition.sources)]
    return "\n".join(lines)

"""What a run leaves to be judged: what callers, the webhook receiver and the readers of database and bucket saw."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum


class Kind(StrEnum):
    """What a job asks for."""

    PLAIN = "plain"
    FROM_UPLOAD = "from_upload"
    FROM_OUTPUT = "from_output"
    KILLS = "kills"
    """Its generation kills the worker process in every attempt."""
    RAISES = "raises"
    """Its generation raises an error in every attempt."""

    @property
    def is_innocent(self) -> bool:
        """Whether nothing but its environment can make it fail."""
        return self not in (Kind.KILLS, Kind.RAISES)


@dataclass(frozen=True)
class Accepted:
    """A job that the API answered with its id."""

    job_id: str
    key: str
    kind: Kind
    images: int
    took_s: float
    """From the first try to the answer."""
    replayed: bool
    webhook: bool


@dataclass(frozen=True)
class Answer:
    """What a caller got for one request; `status` 0 is a broken connection."""

    route: str
    status: int
    media_type: str
    took_s: float
    detail: str = ""


@dataclass(frozen=True)
class Seen:
    """The state of a job in one answer of the API, or in one reading of the database."""

    job_id: str
    status: str


@dataclass(frozen=True)
class JobRow:
    """A job at the end of the run."""

    status: str
    error_code: str | None


@dataclass(frozen=True)
class OutputRow:
    """An image that the database names."""

    position: int
    key: str
    sha256: str


@dataclass(frozen=True)
class Delivery:
    """A webhook that arrived."""

    webhook_id: str
    job_id: str
    type: str
    signed: bool


@dataclass(frozen=True)
class Sample:
    """The resources of one process at one time."""

    process: str
    pid: int
    at: float
    rss_bytes: int
    descriptors: int
    threads: int
    sockets: int


@dataclass(frozen=True)
class Facts:
    """All of it, after the last job has ended and maintenance has caught up."""

    accepted: Sequence[Accepted] = ()
    jobs: Mapping[str, JobRow] = field(default_factory=dict[str, JobRow])
    cancellations: frozenset[str] = frozenset()
    """Jobs whose cancellation a caller requested, answered or not."""
    events: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])
    """The types of each job's events, oldest first."""
    outputs: Mapping[str, Sequence[OutputRow]] = field(default_factory=dict[str, Sequence[OutputRow]])
    objects: Mapping[str, str] = field(default_factory=dict[str, str])
    """The SHA-256 of every object, by its key."""
    uploads: frozenset[str] = frozenset()
    """Keys of the uploads that the database names."""
    downloads: Sequence[tuple[str, bool]] = ()
    """Jobs whose image was downloaded by its link, and whether its bytes had the SHA-256 that the API named."""
    webhook_ids: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])
    """The ids of each job's webhook events in the database."""
    deliveries: Sequence[Delivery] = ()
    answers: Sequence[Answer] = ()
    seen: Sequence[Seen] = ()
    """States in the order in which they were seen, of each job by one reader after another."""
    samples: Sequence[Sample] = ()
    unexpected_ends: Sequence[tuple[str, int]] = ()
    """Processes that ended although no fault ended them, and their statuses."""
    max_attempts: int = 3

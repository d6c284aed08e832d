"""The services and settings that every job loop works with."""

from collections.abc import Callable
from dataclasses import dataclass

from worker.patient_storage import PatientStorage
from worker.shutdown import Shutdown
from zcore.jobs.database import Database
from zcore.settings import JobsSettings, WorkerSettings
from zcore.stages import Stage


@dataclass(frozen=True)
class WorkerContext:
    """Services, settings and callbacks of the worker called `name`.

    `notify` notifies one worker that serves a stage. `on_ended` is called after each attempt has ended, so that the
    job's webhook is sent without waiting for the next interval. `on_broken` is called when this process must be
    replaced; `on_hung` likewise, with the reason, when one of its threads does not come back.
    """

    database: Database
    storage: PatientStorage
    jobs: JobsSettings
    settings: WorkerSettings
    name: str
    shutdown: Shutdown
    notify: Callable[[Stage], None]
    on_ended: Callable[[], None]
    on_broken: Callable[[], None]
    on_hung: Callable[[str], None]

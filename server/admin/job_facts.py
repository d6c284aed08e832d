"""Values that both the job list and the job page derive from a job."""

from datetime import datetime

from zcore.jobs.models import Job
from zcore.jobs.states import State
from zcore.storage import Storage
from zcore.storage_keys import output_name


def image_links(job: Job, storage: Storage) -> list[str]:
    """Return a link to each output, in order of position; an empty list if the files were deleted."""
    if job.status == State.EXPIRED:
        return []
    return [storage.link(output.key, output_name(job.id, output.position, output.format)).url for output in job.outputs]


def run_time_s(job: Job, now: datetime) -> float | None:
    """Return the seconds from the last claim to the job's end, or to now; None if it has not run."""
    if job.started_at is None or job.status == State.QUEUED:
        return None
    return ((job.completed_at or now) - job.started_at).total_seconds()

"""Paths of the HTTP API, shared by its routes and by the packages that build links to them."""

import uuid

JOBS_PATH = "/api/jobs"
FILES_PATH = "/files"


def job_path(job_id: uuid.UUID | str) -> str:
    """Return the path of a job."""
    return f"{JOBS_PATH}/{job_id}"


def cancel_path(job_id: uuid.UUID | str) -> str:
    """Return the path to POST to in order to cancel a job."""
    return f"{job_path(job_id)}/cancel"

"""The use case behind every entry point: check a submission, store it as a queued job, notify a worker, wait if asked.

Takes a validated `Submission` and its `Caller`; returns a `JobResource`. Knows nothing of HTTP: routes translate their
bodies and headers into these calls, and the results into status codes.
"""

import hashlib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from server.callers import Caller
from server.prompt_check import PromptCheck, check_web_addresses
from server.threads import Threads
from server.watch import Watch
from zcore.broker import Notifier
from zcore.jobs import lifecycle, lora_library, queries
from zcore.jobs.database import Database
from zcore.jobs.resource import JobResource, describe
from zcore.jobs.states import TERMINAL
from zcore.request import Submission
from zcore.settings import Settings
from zcore.stages import Stage
from zcore.storage import Storage


@dataclass(frozen=True, slots=True)
class Accepted:
    """The job of an accepted submission. `replayed`: an earlier submission with the same key had already created it."""

    job: JobResource
    replayed: bool


@dataclass(frozen=True, slots=True)
class Submissions:
    """Accepts submissions and looks up their jobs."""

    settings: Settings
    database: Database
    storage: Storage
    notifier: Notifier
    prompt_check: PromptCheck
    watch: Watch
    threads: Threads

    async def submit(
        self, submission: Submission, caller: Caller, fingerprint: str, idempotency_key: str | None = None
    ) -> Accepted:
        """Store the submission as a queued job and notify a worker.

        `fingerprint` identifies the body for `idempotency_key`. Raises `InvalidRequest` if a check fails, and
        `KeyReused` if the key was used with another body.
        """
        await self.threads.local.run(self._check, submission)
        return await self.threads.database.run(self._store, submission, caller, fingerprint, idempotency_key)

    async def wait(self, job: JobResource, caller: Caller, timeout_s: float) -> JobResource:
        """Wait until the job has ended or `timeout_s` seconds have passed, and return it as it is then."""
        if job.status in TERMINAL:
            return job
        job_id = uuid.UUID(job.id)
        await self.watch.ended(job_id, timeout_s)
        return await self.threads.database.run(self.look_up, job_id, caller)

    def look_up(self, job_id: uuid.UUID, caller: Caller) -> JobResource:
        """Return the caller's job with fresh links. Raises `NotFound` if it does not exist or has another owner."""
        with self.database.read() as transaction:
            job = queries.get(transaction, job_id, caller.name)
            position = queries.queue_position(transaction, job)
            return describe(job, self.settings.public_url, self.storage.link, position)

    def _check(self, submission: Submission) -> None:
        check_web_addresses(submission, self.settings.webhooks)
        self.prompt_check.check(submission.request)  # tokenizes, which takes up to a fifth of a second

    def _store(self, submission: Submission, caller: Caller, fingerprint: str, idempotency_key: str | None) -> Accepted:
        with self.database.write() as transaction:
            submitted = lifecycle.submit(
                transaction,
                submission,
                caller.name,
                fingerprint,
                self.settings.jobs.max_attempts,
                idempotency_key,
                self.settings.jobs.first_stage,
            )
            # Only a worker knows which LoRAs its folder contains.
            if not (submitted.replayed or self.settings.lora.folder):
                lora_library.check(transaction, submission.request)
            position = queries.queue_position(transaction, submitted.job)
            resource = describe(submitted.job, self.settings.public_url, self.storage.link, position)
        self.notifier.notify(Stage(submitted.job.stage))  # only after the commit
        return Accepted(resource, submitted.replayed)


def fingerprint_of(body: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a JSON body in hexadecimal, independent of key order and whitespace."""
    return hashlib.sha256(msgspec.json.encode(body, order="deterministic")).hexdigest()

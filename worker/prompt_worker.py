"""Encodes prompts for jobs whose images another worker generates.

Needs no GPU. The embedding reaches the other worker only through storage, so a worker that dies in between costs one
attempt. Does not depend on how an embedding is computed or serialized.
"""

import time
from collections.abc import Callable
from typing import Any, Protocol

from worker.context import WorkerContext
from worker.heartbeat import Heartbeat
from worker.loop import JobLoop, milliseconds, waited_ms
from worker.phases import Phase
from zcore.jobs import lifecycle, states
from zcore.jobs.database import Transaction
from zcore.jobs.models import Job
from zcore.jobs.states import State
from zcore.jobs.workers import CacheCounts
from zcore.request import GenerationRequest
from zcore.stages import Stage
from zcore.storage_keys import embedding_key
from zcore.telemetry import log


class PromptEncoderLike(Protocol):
    """Interface of `zcore.imaging.prompt_encoder.PromptEncoder` that the worker uses."""

    def encode(self, request: GenerationRequest) -> Any:
        """Return the embedding of the request's prompt."""
        ...

    def describe(self) -> dict[str, str]:
        """Return the names of the model parts that compute the embedding."""
        ...

    def cache_statistics(self) -> CacheCounts:
        """Return how often the embedding cache helped."""
        ...


class PromptWorker(JobLoop):
    """Job loop of the stage `encode`."""

    def __init__(self, encoder: PromptEncoderLike, write: Callable[[Any], bytes], context: WorkerContext) -> None:
        """`write` converts an embedding to the bytes that are stored."""
        super().__init__(context)
        self._encoder = encoder
        self._write = write

    def cache_counts(self) -> CacheCounts:
        """Return how often the embedding cache of this worker helped."""
        return self._encoder.cache_statistics()

    def finish(self) -> None:
        """Return at once: no work continues after `drain`."""

    def _work(self, job: Job, request: GenerationRequest, heartbeat: Heartbeat) -> None:
        started = time.monotonic()
        heartbeat.enter(Phase.ENCODE)
        embedding = self._encoder.encode(request)
        encoded = time.monotonic()
        heartbeat.enter(Phase.UPLOAD)
        key = embedding_key(job.id, job.attempt)
        self._context.storage.put(key, self._write(embedding), "application/octet-stream", heartbeat.check)
        stored = time.monotonic()
        heartbeat.enter(Phase.COMPLETE)
        self._pass_on(
            heartbeat,
            {
                "queue_ms": waited_ms(job),
                "encode_ms": milliseconds(encoded - started),
                "upload_ms": milliseconds(stored - encoded),
            },
        )
        heartbeat.stop()

    def _pass_on(self, heartbeat: Heartbeat, metrics: dict[str, Any]) -> None:
        engine = self._encoder.describe()

        def write(transaction: Transaction) -> Job | None:
            return lifecycle.complete_encoding(transaction, heartbeat.lease, metrics, engine)

        job = self._record(heartbeat, states.COMPLETE_ENCODING, write)
        log.info("job.encoded", status=job.status, **metrics)
        if job.status == State.QUEUED:
            self._context.notify(Stage.GENERATE)
        else:
            self._context.on_ended()

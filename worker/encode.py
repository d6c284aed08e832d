"""A prompt's embedding for a job that another worker paints: encode, store, pass on.

Takes a loaded prompt encoder and a `Workplace`. Needs no GPU. Only the stored object leads from here to the painter: a
worker that dies in between has only cost an attempt. Does not know how an embedding is made or written down.
"""

import time
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from worker import embeddings
from worker.loop import JobLoop, Workplace, milliseconds, waited_ms
from worker.pulse import Pulse
from zcore.errors import LeaseLost
from zcore.jobs import lifecycle
from zcore.jobs.lifecycle import Lease
from zcore.jobs.models import Job
from zcore.jobs.states import State
from zcore.request import GenerationRequest
from zcore.stages import Stage
from zcore.telemetry import log


class Encoding(Protocol):
    """What makes embeddings, as `zcore.imaging.prompt_encoder.PromptEncoder` does."""

    def encode(self, request: GenerationRequest) -> Any:
        """The embedding of the request's prompt."""
        ...

    def describe(self) -> dict[str, str]:
        """What makes it."""
        ...


class Encoder(JobLoop):
    """The encoding of prompts in this process."""

    def __init__(self, encoding: Encoding, write: Callable[[Any], bytes], workplace: Workplace) -> None:
        """`write` turns an embedding into the bytes that are stored."""
        super().__init__(workplace)
        self._encoding = encoding
        self._write = write

    def finish(self) -> None:
        """Nothing is under way beside `drain`."""

    def _work(self, job: Job, lease: Lease, pulse: Pulse) -> None:
        began = time.monotonic()
        embedding = self._encoding.encode(msgspec.convert(job.request, GenerationRequest))
        encoded = time.monotonic()
        pulse.check()
        key = embeddings.key_of(job.id, job.attempt)
        try:
            give_up_at = encoded + self._place.settings.upload_retry_s
            self._put(key, self._write(embedding), embeddings.CONTENT_TYPE, pulse, give_up_at)
            stored = time.monotonic()
            self._pass_on(
                lease,
                {
                    "queue_ms": waited_ms(job),
                    "encode_ms": milliseconds(encoded - began),
                    "upload_ms": milliseconds(stored - encoded),
                },
            )
        except LeaseLost:
            self._delete([key])  # perhaps after the job has ended, and its embeddings have been cleared away
            raise
        pulse.stop()

    def _pass_on(self, lease: Lease, metrics: dict[str, Any]) -> None:
        with self._place.database.write() as transaction:
            passed = lifecycle.pass_on(transaction, lease, metrics, self._encoding.describe())
        if passed is None:
            raise LeaseLost("another worker has this job by now")
        log.info("job.encoded", status=passed.status, **metrics)
        if passed.status == State.QUEUED:
            self._place.announce(Stage.GENERATE)
        else:
            self._place.on_ended()

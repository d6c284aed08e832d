"""A job's pictures: paint, store, complete.

Takes a loaded pipeline, the source of what requests start from, and a `Workplace`. While the next picture is painted,
the last one is encoded, uploaded and completed by other threads. Paints from the embedding that another worker stored,
where there is one; who serves the stage `encode` too makes those that are missing, who does not sends such a job there.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import msgspec

from worker import embeddings, pictures
from worker.inputs import FetchedInputs, InputSource
from worker.loop import JobLoop, Workplace, milliseconds, waited_ms
from worker.pulse import Pulse
from zcore.errors import EmbeddingLost, InvalidRequest, LeaseLost, NotFound
from zcore.imaging.encode import encode_image
from zcore.jobs import lifecycle
from zcore.jobs.lifecycle import Lease, StoredOutput
from zcore.jobs.models import Job
from zcore.request import GenerationRequest
from zcore.stages import Stage
from zcore.telemetry import bound, log

if TYPE_CHECKING:
    from zcore.imaging.pipeline import GenerationResult, ZImagePipeline


@dataclass(frozen=True)
class _Painted:
    """A job whose pixels are there and whose lease is still held."""

    job: Job
    lease: Lease
    pulse: Pulse
    request: GenerationRequest
    inputs: FetchedInputs
    result: "GenerationResult"
    from_embedding: bool


class Generator(JobLoop):
    """The GPU's work in this process."""

    def __init__(
        self,
        pipeline: "ZImagePipeline",
        read_embedding: Callable[[bytes], Any],
        inputs: InputSource,
        workplace: Workplace,
    ) -> None:
        """`read_embedding` takes the bytes that an `Encoder` stored; it raises `InvalidRequest` of the field
        `embeddings` for others, as the pipeline does for an embedding of another model.
        """
        super().__init__(workplace)
        self._pipeline = pipeline
        self._read_embedding = read_embedding
        self._inputs = inputs
        self._encodes = Stage.ENCODE in workplace.settings.stages
        backlog = workplace.settings.upload_backlog
        self._uploads = ThreadPoolExecutor(max_workers=backlog, thread_name_prefix="upload")
        # Painting waits when this many painted jobs are not stored yet, so that a slow bucket cannot fill the memory.
        self._backlog = threading.BoundedSemaphore(backlog)

    def finish(self) -> None:
        """Waits until everything painted is stored and completed."""
        self._uploads.shutdown(wait=True)

    def _work(self, job: Job, lease: Lease, pulse: Pulse) -> None:
        painted = self._paint(job, lease, pulse)
        self._backlog.acquire()
        self._uploads.submit(self._store, painted)

    def _paint(self, job: Job, lease: Lease, pulse: Pulse) -> _Painted:
        request = msgspec.convert(job.request, GenerationRequest)
        is_encoded = job.stage == Stage.GENERATE and job.embedding_attempt is not None
        if not (is_encoded or self._encodes):
            raise EmbeddingLost("the prompt has not been encoded yet")
        inputs = self._inputs.fetch(request, job.owner, pulse.check, pulse.on_relief)
        if is_encoded:
            assert job.embedding_attempt is not None
            try:
                key = embeddings.key_of(job.id, job.embedding_attempt)
                result = self._paint_from(key, request, inputs, pulse)
                return _Painted(job, lease, pulse, request, inputs, result, from_embedding=True)
            except EmbeddingLost as lost:
                if not self._encodes:
                    raise
                log.warning("embedding.lost", error=lost.message)
        result = self._pipeline.generate(request, pulse.on_step, inputs.pictures, pulse.on_relief)
        return _Painted(job, lease, pulse, request, inputs, result, from_embedding=False)

    def _paint_from(
        self, key: str, request: GenerationRequest, inputs: FetchedInputs, pulse: Pulse
    ) -> "GenerationResult":
        try:
            embedding = self._read_embedding(self._place.storage.get(key))
            given = replace(inputs.pictures, embedding=embedding)
            return self._pipeline.generate(request, pulse.on_step, given, pulse.on_relief)
        except NotFound as fault:
            raise EmbeddingLost("the prompt's embedding is no longer in storage") from fault
        except InvalidRequest as fault:
            if all(error.pointer != "/embeddings" for error in fault.errors):
                raise
            raise EmbeddingLost(f"the prompt's embedding was refused: {fault.message}") from fault

    def _store(self, painted: _Painted) -> None:
        """Runs beside the next job's painting; the lease is held until the very end."""
        job = painted.job
        with bound(job_id=str(job.id), attempt=job.attempt):
            try:
                self._complete(painted)
            except Exception as fault:
                if self._end(painted.lease, fault):
                    self._delete(pictures.keys_of(job.id, [job.attempt], painted.request.n, painted.request.format))
            finally:
                painted.pulse.stop()
                self._backlog.release()

    def _complete(self, painted: _Painted) -> None:
        began = time.monotonic()
        give_up_at = began + self._place.settings.upload_retry_s
        engine = self._engine(painted)
        outputs = [self._put_picture(painted, index, engine, give_up_at) for index in range(len(painted.result.images))]
        metrics = _metrics(painted, upload_ms=milliseconds(time.monotonic() - began))
        painted.pulse.write_notes()  # afterwards the job has no lease
        with self._place.database.write() as transaction:
            job = lifecycle.complete(transaction, painted.lease, outputs, metrics, engine, self._place.jobs.retention_s)
        if job is None:
            raise LeaseLost("another worker has this job by now")
        log.info("job.succeeded", **metrics)
        self._place.on_ended()
        # Pictures that earlier attempts stored before their worker was lost. Their keys are known, not listed.
        self._delete(pictures.keys_of(job.id, range(1, job.attempt), painted.request.n, painted.request.format))

    def _put_picture(self, painted: _Painted, index: int, engine: dict[str, str], give_up_at: float) -> StoredOutput:
        """Encodes and stores one picture."""
        painted.pulse.check()
        image = painted.result.images[index]
        encoded = encode_image(image.image, painted.request, image.index, engine, painted.inputs.sha256s)
        key = pictures.key_of(painted.job.id, painted.job.attempt, index, encoded.format)
        self._put(key, encoded.content, encoded.media_type, painted.pulse, give_up_at)
        return StoredOutput(
            position=index,
            key=key,
            format=encoded.format,
            width=encoded.width,
            height=encoded.height,
            bytes=len(encoded.content),
            sha256=encoded.sha256,
            seed=image.seed,
        )

    def _engine(self, painted: _Painted) -> dict[str, str]:
        """What made the pictures: this pipeline, and before it whoever encoded the prompt."""
        encoder = painted.job.engine if painted.from_embedding else {}
        return {**encoder, **painted.result.made_by}


def _metrics(painted: _Painted, upload_ms: int) -> dict[str, Any]:
    """Milliseconds of both stages together, where there were two."""
    measured = {name: round(value) for name, value in asdict(painted.result.metrics).items()}
    metrics = {"queue_ms": waited_ms(painted.job), **measured, "upload_ms": upload_ms}
    if painted.from_embedding:
        for name, spent_ms in painted.job.metrics.items():
            metrics[name] = metrics.get(name, 0) + spent_ms
    spent = ("queue_ms", "encode_ms", "denoise_ms", "decode_ms", "upload_ms")
    return {**metrics, "total_ms": sum(metrics[name] for name in spent)}

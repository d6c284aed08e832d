"""Generates the images of a job, stores them, and completes the job.

While one job's images are generated, the previous job's images are encoded, uploaded and completed by other threads.
If another worker has stored an embedding of the prompt, that is used. If the embedding is missing, a worker that also
serves the stage `encode` encodes the prompt itself, and any other worker sends the job back to that stage.
"""

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from worker.abandonable import CHECK_INTERVAL_S
from worker.context import WorkerContext
from worker.heartbeat import Heartbeat
from worker.inputs.fetch import FetchedInputs, InputSource
from worker.loop import JobLoop, milliseconds, waited_ms
from worker.phases import Phase
from zcore.errors import EmbeddingLost, InvalidEmbedding, NotFound
from zcore.image_files.writing import Marks, write_image
from zcore.jobs import lifecycle, queries, states
from zcore.jobs.database import Transaction
from zcore.jobs.lifecycle import StoredOutput
from zcore.jobs.models import Job
from zcore.jobs.workers import CacheCounts
from zcore.request import GenerationRequest
from zcore.stages import Stage
from zcore.storage_keys import embedding_key, output_key
from zcore.telemetry import bound, log

if TYPE_CHECKING:
    from zcore.imaging.pipeline import GenerationResult, ZImagePipeline


@dataclass(frozen=True)
class _Generated:
    """A job whose images are generated and not yet stored; its lease is still held."""

    job: Job
    heartbeat: Heartbeat
    request: GenerationRequest
    fetched: FetchedInputs
    result: "GenerationResult"
    encoding: Mapping[str, Any]
    """The metrics and the engine of the worker that encoded the prompt; empty if this one has."""


class ImageWorker(JobLoop):
    """Job loop of the stage `generate`, and of whole jobs if the worker also serves `encode`."""

    def __init__(
        self,
        pipeline: "ZImagePipeline",
        read_embedding: Callable[[bytes], Any],
        input_source: InputSource,
        context: WorkerContext,
        marks: Marks,
    ) -> None:
        """`marks` go into every image file. `read_embedding` converts the bytes that a `PromptWorker` stored.

        It raises `InvalidEmbedding` for the field `embeddings` if it cannot read them, as the pipeline does for an
        embedding of another model.
        """
        super().__init__(context)
        self._pipeline = pipeline
        self._read_embedding = read_embedding
        self._input_source = input_source
        self._marks = marks
        self._serves_encode = Stage.ENCODE in context.settings.stages
        backlog = context.settings.upload_backlog
        self._uploads = ThreadPoolExecutor(max_workers=backlog, thread_name_prefix="upload")
        # Generation waits while this many jobs are not stored yet, so that slow storage cannot fill the memory.
        self._backlog = threading.BoundedSemaphore(backlog)

    def cache_counts(self) -> CacheCounts:
        """Return how often the embedding cache of this worker helped."""
        return self._pipeline.cache_statistics()

    def finish(self) -> None:
        """Wait until all generated images are stored and their jobs completed."""
        self._uploads.shutdown(wait=True)

    def _work(self, job: Job, request: GenerationRequest, heartbeat: Heartbeat) -> None:
        generated = self._generate(job, request, heartbeat)
        heartbeat.enter(Phase.WAIT)
        while not self._backlog.acquire(timeout=CHECK_INTERVAL_S):
            heartbeat.check()
        self._uploads.submit(self._store, generated)

    def _generate(self, job: Job, request: GenerationRequest, heartbeat: Heartbeat) -> _Generated:
        is_encoded = job.stage == Stage.GENERATE and job.embedding_attempt is not None
        if not (is_encoded or self._serves_encode):
            raise EmbeddingLost("the prompt has not been encoded yet")
        heartbeat.enter(Phase.FETCH)
        fetched = self._input_source.fetch(request, job.owner, heartbeat.check, heartbeat.on_fallback)
        if is_encoded:
            assert job.embedding_attempt is not None
            try:
                encoding = self._encoding(job)
                key = embedding_key(job.id, job.embedding_attempt)
                result = self._generate_from_embedding(key, request, fetched, heartbeat)
                return _Generated(job, heartbeat, request, fetched, result, encoding)
            except EmbeddingLost as fault:
                if not self._serves_encode:
                    raise
                log.warning("embedding.lost", error=fault.message)
        heartbeat.enter(Phase.ENCODE)
        result = self._pipeline.generate(request, heartbeat.on_step, fetched.inputs, heartbeat.on_fallback)
        return _Generated(job, heartbeat, request, fetched, result, encoding={})

    def _encoding(self, job: Job) -> dict[str, Any]:
        with self._context.database.read() as transaction:
            return queries.last_detail(transaction, job.id, states.COMPLETE_ENCODING.event)

    def _generate_from_embedding(
        self, key: str, request: GenerationRequest, fetched: FetchedInputs, heartbeat: Heartbeat
    ) -> "GenerationResult":
        try:
            embedding = self._read_embedding(self._context.storage.get(key, heartbeat.check))
            inputs = replace(fetched.inputs, embedding=embedding)
            heartbeat.enter(Phase.ENCODE)
            return self._pipeline.generate(request, heartbeat.on_step, inputs, heartbeat.on_fallback)
        except NotFound as fault:
            raise EmbeddingLost("the prompt's embedding is no longer in storage") from fault
        except InvalidEmbedding as fault:
            raise EmbeddingLost(f"the prompt's embedding was refused: {fault.message}") from fault

    def _store(self, generated: _Generated) -> None:
        """Store and complete a job while the next one is generated. The lease is held until the end."""
        job = generated.job
        with bound(job_id=str(job.id), attempt=job.attempt):
            try:
                self._complete(generated)
            except Exception as fault:
                self._end_attempt(generated.heartbeat, fault)
            finally:
                generated.heartbeat.stop()
                self._backlog.release()

    def _complete(self, generated: _Generated) -> None:
        started = time.monotonic()
        engine = _engine(generated)
        outputs = [self._store_image(generated, index, engine) for index in range(len(generated.result.images))]
        metrics = _metrics(generated, upload_ms=milliseconds(time.monotonic() - started))
        generated.heartbeat.enter(Phase.COMPLETE)
        generated.heartbeat.write_events()  # the job has no lease after `complete`
        retention_s = self._context.jobs.retention_s

        def write(transaction: Transaction) -> Job | None:
            return lifecycle.complete(transaction, generated.heartbeat.lease, outputs, metrics, engine, retention_s)

        self._record(generated.heartbeat, states.COMPLETE, write)
        log.info("job.succeeded", **metrics)
        self._context.on_ended()

    def _store_image(self, generated: _Generated, index: int, engine: dict[str, str]) -> StoredOutput:
        heartbeat = generated.heartbeat
        image = generated.result.images[index]
        heartbeat.enter(Phase.WRITE_IMAGE)
        file = write_image(image.image, generated.request, image.index, engine, generated.fetched.sha256s, self._marks)
        key = output_key(generated.job.id, generated.job.attempt, index, file.format)
        heartbeat.enter(Phase.UPLOAD)
        self._context.storage.put(key, file.content, file.media_type, heartbeat.check)
        return StoredOutput(
            position=index,
            key=key,
            format=file.format,
            width=file.width,
            height=file.height,
            bytes=len(file.content),
            sha256=file.sha256,
            seed=image.seed,
        )


def _engine(generated: _Generated) -> dict[str, str]:
    """Describe what generated the images: this pipeline, and the worker that encoded the prompt if there was one."""
    return {**generated.encoding.get("engine", {}), **generated.result.made_by}


def _metrics(generated: _Generated, upload_ms: int) -> dict[str, Any]:
    """Return the metrics of the job. Times are in milliseconds, summed over both stages if there were two."""
    measured = {name: round(value) for name, value in asdict(generated.result.metrics).items()}
    metrics = {"queue_ms": waited_ms(generated.job), **measured, "upload_ms": upload_ms}
    for name, spent_ms in generated.encoding.get("metrics", {}).items():
        metrics[name] = metrics.get(name, 0) + spent_ms
    parts = ("queue_ms", "encode_ms", "denoise_ms", "decode_ms", "upload_ms")
    return {**metrics, "total_ms": sum(metrics[name] for name in parts)}

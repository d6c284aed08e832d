"""Builds and runs the worker processes from the settings; no other module of the worker reads them as a whole.

`run_worker` runs one process per device: Celery with a pool of one thread, in which each notification starts `drain`.
Threads are used instead of child processes because a process that is forked after torch has computed hangs, and because
a stop flag and a heartbeat then need no second process. If a worker crashes, its supervisor (compose, `make run`)
restarts it, and its job is rescued when the lease expires.
`run_maintenance` runs only maintenance and webhook delivery, for a host without a GPU.
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

from celery import Celery
from celery.signals import worker_shutting_down

from worker.backoff import pauses
from worker.context import WorkerContext
from worker.forced_exit import force_exit_when_overdue, leave
from worker.image_worker import ImageWorker
from worker.inputs.fetch import InputSource
from worker.inputs.lora_cache import LoraCache
from worker.inputs.lora_sources import LoraFolder, RegisteredLoras
from worker.loop import JobLoop
from worker.maintenance.scheduler import Maintenance
from worker.patient_storage import PatientStorage
from worker.presence import Presence
from worker.prompt_worker import PromptWorker
from worker.shutdown import Shutdown
from worker.webhooks.delivery import Deliverer
from zcore.broker import DRAIN_TASK, Notifier, make_app, queue_name
from zcore.data_folder import UMASK, make_private
from zcore.errors import StorageError, ZImageError
from zcore.foreign_text import first_line
from zcore.image_files.configured_marks import configured_marks
from zcore.jobs.database import Database, DatabaseError
from zcore.keys import load_keys
from zcore.settings import Settings, load_settings, overrides_from_arguments
from zcore.stages import Stage
from zcore.storage import Storage, open_storage
from zcore.telemetry import configure_logging, log

BROKEN_STATUS = 70  # EX_SOFTWARE: the supervisor starts a new worker
CONNECTIONS = 1
"""To PostgreSQL, of a worker: its transactions are short, so its threads share one."""
CONNECTIONS_WITH_MAINTENANCE = 2
"""Some statements of maintenance take long, so no heartbeat waits for them; the second is open while both are used."""
HUNG_GRACE_S = 5.0
"""How long the other jobs of a process may go on after one of its threads has hung."""
HELPER_INTERVALS = 10
"""How many intervals of maintenance pass until a deliverer looks for due webhooks without being notified."""
START_BACKOFF_S = (0.5, 1.0, 2.0, 5.0, 15.0)


@dataclass(frozen=True)
class _Services:
    """The parts that every worker process has."""

    settings: Settings
    shutdown: Shutdown
    database: Database
    storage: Storage
    app: Celery
    notifier: Notifier
    deliverer: Deliverer
    maintenance: Maintenance


def run_worker(arguments: Sequence[str]) -> None:
    """Run a worker for the stages in the settings until SIGTERM or Ctrl-C.

    `arguments` are settings as `name=value`. Waits until the database and the storage answer. Exits with status 2 and a
    one-line message on errors that waiting cannot fix, and with `BROKEN_STATUS` if the process must be replaced.
    """
    services = _assemble("worker", arguments)
    settings = services.settings
    _wait_for_services(services)
    name = f"{socket.gethostname()}:{os.getpid()}"
    stages = settings.worker.stages
    log.info("worker.loading", model=settings.model_location, stages=stages)
    try:
        loop = _open_loop(services, name)
    except ZImageError as fault:
        _exit_with(fault)
    device = settings.pipeline.device if Stage.GENERATE in stages else settings.encoder.device
    presence = Presence(
        services.database, name, settings.model_location, device, stages, services.shutdown, loop.cache_counts
    )
    services.app.task(name=DRAIN_TASK)(loop.drain)

    def begin_shutdown(**_: Any) -> None:
        log.info("worker.shutdown_started")
        services.shutdown.begin()

    worker_shutting_down.connect(begin_shutdown, weak=False)
    force_exit_when_overdue(
        services.shutdown, lambda: BROKEN_STATUS if loop.is_broken or loop.attempts_in_progress else 0
    )
    presence.start()
    if settings.worker.maintenance:
        services.deliverer.start()
        services.maintenance.start()
    for stage in stages:
        services.notifier.notify(stage)  # jobs may have been waiting for a worker to start
    log.info("worker.started", model=settings.model_location, stages=stages)
    try:
        services.app.worker_main(_celery_arguments(stages))
        if not services.shutdown.is_begun:
            # Celery returns after an error of its own too, as if it had been stopped.
            print("worker: exiting, because Celery has stopped by itself; start a new worker", file=sys.stderr)
            raise SystemExit(BROKEN_STATUS)
    finally:
        services.shutdown.begin()
        loop.finish()
        presence.stop()
        _stop(services, with_maintenance=settings.worker.maintenance)
        if loop.is_broken:
            print("worker: exiting, because this process can no longer run jobs; start a new one", file=sys.stderr)
            raise SystemExit(BROKEN_STATUS)


def run_maintenance(arguments: Sequence[str]) -> None:
    """Run maintenance and webhook delivery until SIGTERM or Ctrl-C. Waits and exits as `run_worker` does."""
    services = _assemble("maintenance", arguments)
    _wait_for_services(services)

    def begin_shutdown(_number: int, _frame: FrameType | None) -> None:
        services.shutdown.begin()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, begin_shutdown)
    force_exit_when_overdue(services.shutdown, lambda: 0)
    services.deliverer.start()
    services.maintenance.start()
    log.info("maintenance.started")
    while not services.shutdown.wait(3600):
        pass
    _stop(services, with_maintenance=True)


def _assemble(process: str, arguments: Sequence[str]) -> _Services:
    try:
        settings = load_settings(os.environ, overrides_from_arguments(arguments))
        configure_logging(settings.log, process)
        os.umask(UMASK)
        keys = load_keys(settings)
        make_private(settings)
        maintains = process == "maintenance" or settings.worker.maintenance
        connections = CONNECTIONS_WITH_MAINTENANCE if maintains else CONNECTIONS
        database = Database(settings.database_url, pool_size=1, overflow=connections - 1)
        storage = open_storage(settings, keys.link)
    except ZImageError as fault:
        _exit_with(fault)
    shutdown = Shutdown(settings.worker.shutdown_grace_s)
    app = make_app(settings)
    notifier = Notifier(app)
    interval_s = settings.worker.maintenance_interval_s
    deliverer = Deliverer(
        database,
        storage.link,
        settings.public_url,
        keys.webhook,
        settings.webhooks,
        # The leader of maintenance triggers its own deliverer; those of other processes help while many are due.
        interval_s * HELPER_INTERVALS,
        shutdown,
    )
    maintenance = Maintenance(
        database,
        storage,
        notifier.notify_again,
        deliverer.notify,
        interval_s,
        shutdown,
        settings.storage.sweep_min_age_s,
        settings.jobs.history_s,
        settings.jobs.lease_s,
    )
    return _Services(settings, shutdown, database, storage, app, notifier, deliverer, maintenance)


def _open_loop(services: _Services, name: str) -> JobLoop:
    """Load what the stages need. A worker that serves both stages processes whole jobs."""
    from worker import load_model  # loads torch, which a host for maintenance alone need not have

    settings = services.settings

    def notify_all_stages() -> None:
        for stage in settings.worker.stages:
            services.notifier.notify(stage)

    storage = PatientStorage(services.storage, settings.worker.upload_retry_s, on_return=notify_all_stages)
    context = WorkerContext(
        services.database,
        storage,
        settings.jobs,
        settings.worker,
        name=name,
        shutdown=services.shutdown,
        notify=services.notifier.notify,
        on_ended=services.deliverer.notify,
        on_broken=lambda: os.kill(os.getpid(), signal.SIGTERM),
        on_hung=lambda reason: _leave_hung(reason, services.shutdown, loop),
    )
    if Stage.GENERATE in settings.worker.stages:
        marks = configured_marks(settings.image_files)  # before the model, which takes long to load
        pipeline = load_model.load_pipeline(settings)
        lora_sources = [LoraFolder(settings.lora_path), RegisteredLoras(services.database, storage)]
        loras = LoraCache(lora_sources, pipeline.load_lora, settings.lora.cache_bytes)
        input_source = InputSource(services.database, storage, settings.webhooks, settings.limits, loras)
        loop: JobLoop = ImageWorker(pipeline, load_model.read_embedding, input_source, context, marks)
    else:
        loop = PromptWorker(load_model.load_encoder(settings), load_model.write_embedding, context)
    return loop


def _leave_hung(reason: str, shutdown: Shutdown, loop: JobLoop) -> None:
    """Exit although a thread does not come back. The other jobs are completed or handed back first, in limited time."""
    log.error("worker.hung", reason=reason)
    shutdown.hurry(HUNG_GRACE_S)
    while loop.attempts_in_progress > 1:  # `force_exit_when_overdue` ends this
        time.sleep(0.1)
    leave(BROKEN_STATUS)


def _wait_for_services(services: _Services) -> None:
    """Wait until the storage and a migrated database answer, which can be written.

    After a power failure everything starts at once, in any order. A worker that exited instead would be restarted again
    and again by its supervisor.
    """
    pauses_s = pauses(START_BACKOFF_S)
    while (missing := _missing_service(services)) is not None:
        log.warning("worker.start_delayed", reason=missing)
        time.sleep(next(pauses_s))


def _missing_service(services: _Services) -> str | None:
    try:
        if (reason := services.database.unready_reason()) is not None:
            return reason
        services.storage.prepare()
    except DatabaseError as fault:
        return first_line(f"the database does not answer: {fault}")
    except StorageError as fault:
        return fault.message
    except ZImageError as fault:
        _exit_with(fault)
    return None


def _stop(services: _Services, with_maintenance: bool) -> None:
    if with_maintenance:
        services.maintenance.stop()
        services.deliverer.stop()
    services.notifier.close()
    services.database.close()
    log.info("worker.stopped")


def _celery_arguments(stages: Sequence[Stage]) -> list[str]:
    quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel=WARNING"]
    name = f"zimage-{os.getpid()}@%h"
    return [
        "--quiet",
        "worker",
        "--pool=threads",
        "--concurrency=1",
        f"--queues={','.join(map(queue_name, stages))}",
        f"--hostname={name}",
        *quiet,
    ]


def _exit_with(fault: ZImageError) -> NoReturn:
    print(f"worker: {fault.message}", file=sys.stderr)
    raise SystemExit(2)

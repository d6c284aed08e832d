"""The worker's only wiring: settings in, threads and the Celery worker out.

`run_worker` is one process per device: a pool of one thread, in which a ring of the doorbell drains the queues of its
stages. Threads, not children: a fork after torch has computed hangs, and a stop flag or a life sign needs no second
process. A worker that crashes is started again by whatever runs it (compose, systemd, `make run`); its job is rescued
by lease.
`run_upkeep` is the clock and the webhooks alone, for a host without a GPU.
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from types import FrameType
from typing import Any, NoReturn

from celery import Celery
from celery.signals import worker_shutting_down
from sqlalchemy import inspect
from sqlalchemy.exc import SQLAlchemyError

from worker.deliver import Deliverer
from worker.encode import Encoder
from worker.generate import Generator
from worker.gpu import load_pipeline, read_embedding, write_embedding
from worker.inputs import InputSource
from worker.loop import JobLoop, Workplace
from worker.presence import Presence
from worker.shutdown import Shutdown
from worker.upkeep import Upkeep
from zcore.broker import DRAIN_TASK, Doorbell, make_app, queue_of
from zcore.errors import StorageError, ZImageError
from zcore.imaging.from_settings import load_encoder
from zcore.jobs.database import Database
from zcore.jobs.models import Job
from zcore.keys import load_keys
from zcore.settings import Settings, load_settings, overrides_from_arguments
from zcore.stages import Stage
from zcore.storage import Storage, open_storage
from zcore.telemetry import configure_logging, log

BROKEN_STATUS = 70  # EX_SOFTWARE: whatever supervises the worker starts a new one
WAITING_BACKOFF_S = (0.5, 1.0, 2.0, 5.0, 15.0)


@dataclass(frozen=True)
class _Parts:
    """What every kind of worker process has."""

    settings: Settings
    shutdown: Shutdown
    database: Database
    storage: Storage
    app: Celery
    doorbell: Doorbell
    deliverer: Deliverer
    upkeep: Upkeep


def run_worker(arguments: Sequence[str]) -> None:
    """A worker of the stages in the settings until SIGTERM or Ctrl-C; `arguments` are settings as `name=value`.

    Waits for a database and a storage that do not answer yet; ends with status 2 and one line for what no waiting
    mends.
    """
    parts = _assemble("worker", arguments)
    settings = parts.settings
    _wait_for_services(parts)
    name = f"{socket.gethostname()}:{os.getpid()}"
    stages = settings.worker.stages
    try:
        loop = _open_loop(parts, name)
    except ZImageError as fault:
        _refuse(fault)
    device = settings.pipeline.device if Stage.GENERATE in stages else settings.encoder.device
    presence = Presence(parts.database, name, settings.model_location, device, stages, parts.shutdown)
    parts.app.task(name=DRAIN_TASK)(loop.drain)

    def begin_shutdown(**_: Any) -> None:
        log.info("worker.leaving")
        parts.shutdown.begin()

    worker_shutting_down.connect(begin_shutdown, weak=False)
    presence.start()
    if settings.worker.upkeep:
        parts.deliverer.start()
        parts.upkeep.start()
    for stage in stages:
        parts.doorbell.announce(stage)  # jobs may have waited for a worker to start
    log.info("worker.ready", model=settings.model_location, stages=stages)
    try:
        parts.app.worker_main(_celery_arguments(stages))
    finally:
        parts.shutdown.begin()
        loop.finish()
        presence.stop()
        _stop(parts, with_clock=settings.worker.upkeep)
        if loop.is_broken:
            print("worker: this process can no longer work; a new one is needed", file=sys.stderr)
            raise SystemExit(BROKEN_STATUS)


def run_upkeep(arguments: Sequence[str]) -> None:
    """The clock and the delivery of webhooks until SIGTERM or Ctrl-C; the rest as `run_worker`."""
    parts = _assemble("upkeep", arguments)
    _wait_for_services(parts)

    def begin_shutdown(_number: int, _frame: FrameType | None) -> None:
        parts.shutdown.begin()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, begin_shutdown)
    parts.deliverer.start()
    parts.upkeep.start()
    log.info("upkeep.ready")
    while not parts.shutdown.wait(3600):
        pass
    _stop(parts, with_clock=True)


def _assemble(process: str, arguments: Sequence[str]) -> _Parts:
    try:
        settings = load_settings(os.environ, overrides_from_arguments(arguments))
        configure_logging(settings.log, process)
        keys = load_keys(settings)
        database = Database(settings.database_url, settings.database.pool_size)
        storage = open_storage(settings, keys.link)
    except ZImageError as fault:
        _refuse(fault)
    shutdown = Shutdown(settings.worker.shutdown_grace_s)
    app = make_app(settings)
    doorbell = Doorbell(app)
    interval_s = settings.worker.upkeep_interval_s
    deliverer = Deliverer(
        database, storage.link, settings.public_url, keys.webhook, settings.webhooks, interval_s, shutdown
    )
    upkeep = Upkeep(database, storage, doorbell.announce, deliverer.wake, interval_s, shutdown)
    return _Parts(settings, shutdown, database, storage, app, doorbell, deliverer, upkeep)


def _open_loop(parts: _Parts, name: str) -> JobLoop:
    """Loads what the stages need. Who serves both does whole jobs."""
    settings = parts.settings
    workplace = Workplace(
        parts.database,
        parts.storage,
        settings.jobs,
        settings.worker,
        name=name,
        shutdown=parts.shutdown,
        announce=parts.doorbell.announce,
        on_ended=parts.deliverer.wake,
        on_broken=lambda: os.kill(os.getpid(), signal.SIGTERM),
    )
    if Stage.GENERATE in settings.worker.stages:
        inputs = InputSource(parts.database, parts.storage, settings.webhooks, settings.limits.max_input_bytes)
        return Generator(load_pipeline(settings), read_embedding, inputs, workplace)
    return Encoder(load_encoder(settings), write_embedding, workplace)


def _wait_for_services(parts: _Parts) -> None:
    """Returns when storage and a migrated database answer: after a power cut everything starts at once, in any order,
    and a worker that gave up would load its model again and again.
    """
    for attempt in count():
        missing = _missing_service(parts)
        if missing is None:
            return
        log.warning("worker.waiting", reason=missing)
        time.sleep(WAITING_BACKOFF_S[min(attempt, len(WAITING_BACKOFF_S) - 1)])


def _missing_service(parts: _Parts) -> str | None:
    try:
        if not inspect(parts.database.engine).has_table(Job.__tablename__):
            return "the database has no tables yet: run `alembic upgrade head`"
        parts.storage.prepare()
    except SQLAlchemyError as fault:
        return f"the database does not answer: {fault}".partition("\n")[0]
    except StorageError as fault:
        return fault.message
    except ZImageError as fault:
        _refuse(fault)
    return None


def _stop(parts: _Parts, with_clock: bool) -> None:
    if with_clock:
        parts.upkeep.stop()
        parts.deliverer.stop()
    parts.doorbell.close()
    parts.database.close()
    log.info("worker.ended")


def _celery_arguments(stages: Sequence[Stage]) -> list[str]:
    quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel=WARNING"]
    name = f"zimage-{os.getpid()}@%h"
    return [
        "--quiet",
        "worker",
        "--pool=threads",
        "--concurrency=1",
        f"--queues={','.join(map(queue_of, stages))}",
        f"--hostname={name}",
        *quiet,
    ]


def _refuse(fault: ZImageError) -> NoReturn:
    print(f"worker: {fault.message}", file=sys.stderr)
    raise SystemExit(2)

"""Worker processes whose jobs kill them or hang, and whose storage is slow, away or silent; times are those of the
database.
"""

import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from uuid import UUID

import pytest

from tests.integration.broker.tcp_proxy import TcpProxy, proxy_to
from tests.integration.installation import Installation, has_logged
from tests.integration.worker.stand_ins import HANGS, POISON
from tests.services.odd_stores import BUCKET, UnsteadyStore, serving
from tests.services.process import Running
from tests.waiting import wait_until
from worker.app import BROKEN_STATUS
from worker.forced_exit import EXIT_MARGIN_S
from zcore.broker import Notifier, make_app
from zcore.jobs import lifecycle, queries
from zcore.jobs.database import Database
from zcore.jobs.models import Event, Job
from zcore.request import GenerationDefaults, RequestLimits, parse_submission
from zcore.stages import Stage

STARTED_S = 60.0
LEASE_S = 4.0


@dataclass
class Fleet:
    """Worker processes with stand-ins for the model, and their store in this process, behind a cable."""

    installation: Installation
    database: Database
    store: UnsteadyStore
    cable: TcpProxy
    processes: ExitStack
    notifier: Notifier
    workers: list[Running] = field(default_factory=list)

    def start(self, count: int = 1) -> None:
        """Start workers, and wait until they take jobs."""
        started = [self._start() for _ in range(count)]
        for worker in started:
            wait_until(lambda worker=worker: has_logged(worker, "worker.started"), timeout_s=STARTED_S)

    def _start(self) -> Running:
        name = f"worker-{len(self.workers)}"
        worker = self.processes.enter_context(
            self.installation.working(package="tests.integration.worker.stand_ins", name=name)
        )
        self.workers.append(worker)
        return worker

    def restart_dead(self, count: int) -> None:
        """Do what a supervisor does: keep `count` workers running."""
        running = [worker for worker in self.workers if worker.process.poll() is None]
        for _ in range(count - len(running)):
            self._start()

    def submit(self, prompt: str, **fields: object) -> UUID:
        """Submit a job, and return its id."""
        body = {"prompt": prompt, "width": 64, "height": 64, "steps": 2, **fields}
        submission = parse_submission(body, GenerationDefaults(), RequestLimits())
        with self.database.write() as transaction:
            job_id = lifecycle.submit(transaction, submission, "anna", "0" * 64, 3).job.id
        self.notifier.notify(Stage.GENERATE)
        return job_id

    def job(self, job_id: UUID) -> Job:
        """Return a job."""
        with self.database.read() as transaction:
            return queries.get(transaction, job_id)

    def has_ended(self, *job_ids: UUID) -> bool:
        """Return whether every job has ended."""
        return all(self.job(job_id).completed_at is not None for job_id in job_ids)

    def timeline(self, job_id: UUID) -> list[Event]:
        """Return a job's events, oldest first."""
        with self.database.read() as transaction:
            return list(queries.timeline(transaction, job_id).events)

    def events(self, job_id: UUID) -> list[str]:
        """Return the types of a job's events."""
        return [event.type for event in self.timeline(job_id)]

    @property
    def generated(self) -> Counter[str]:
        """How often the generation of each prompt was begun."""
        return Counter((self.installation.folder / "generated").read_text().splitlines())

    @property
    def hold(self) -> Path:
        """The file that holds all generations while it exists."""
        return self.installation.folder / "hold-generate"


@contextmanager
def fleet_in(folder: Path, migrated_file: Path, **settings: object) -> Iterator[Fleet]:
    """Open a fleet on SQLite."""
    shutil.copy(migrated_file, folder / "zimage.db")
    store = UnsteadyStore()
    with serving(store) as url, proxy_to(int(url.rpartition(":")[2])) as cable, ExitStack() as processes:
        given = {
            "storage.bucket": BUCKET,
            "storage.endpoint_url": f"http://127.0.0.1:{cable.port}",
            "storage.access_key_id": "key",
            "storage.secret_access_key": "secret",
            "jobs.lease_s": LEASE_S,
            "jobs.retry_delay_s": 0,
            "worker.maintenance_interval_s": 0.2,
            **{name.replace("__", "."): value for name, value in settings.items()},
        }
        installation = Installation(folder, given)
        database = processes.enter_context(installation.database())
        notifier = processes.enter_context(closing(Notifier(make_app(installation.settings))))
        try:
            yield Fleet(installation, database, store, cable, processes, notifier)
        finally:
            store.answers.set()


@pytest.mark.parametrize("fault", ["refused", "503"])
def test_an_outage_of_storage_of_four_times_the_retry_time_loses_no_job(
    tmp_path: Path, migrated_file: Path, fault: str
) -> None:
    with fleet_in(tmp_path, migrated_file, worker__upload_retry_s=1.0, jobs__lease_s=30.0) as fleet:
        fleet.start(2)
        fleet.hold.touch()
        jobs = [fleet.submit(f"job {index}") for index in range(30)]
        wait_until(lambda: sum(fleet.job(job_id).status == "running" for job_id in jobs) == 2)
        if fault == "refused":
            fleet.cable.cut()
        fleet.store.is_unavailable = fault == "503"
        fleet.hold.unlink()
        for worker in fleet.workers:
            wait_until(lambda worker=worker: has_logged(worker, "storage.away"))
        began_at = database_time(fleet)
        wait_until(lambda: (database_time(fleet) - began_at).total_seconds() > 4.0)
        assert not any(fleet.has_ended(job_id) for job_id in jobs)
        fleet.store.is_unavailable = False
        fleet.cable.plug()
        wait_until(lambda: fleet.has_ended(*jobs), timeout_s=120)
        assert {fleet.job(job_id).status for job_id in jobs} == {"succeeded"}
        assert {tuple(fleet.events(job_id)) for job_id in jobs} == {("queued", "claimed", "succeeded")}
        assert set(fleet.generated.values()) == {1}


def database_time(fleet: Fleet) -> datetime:
    """Return the time of the database."""
    with fleet.database.read() as transaction:
        return transaction.now


def test_a_worker_that_is_stopped_while_its_uploads_hang_hands_them_back_in_time(
    tmp_path: Path, migrated_file: Path
) -> None:
    with fleet_in(tmp_path, migrated_file, worker__shutdown_grace_s=1.0, jobs__lease_s=30.0) as fleet:
        fleet.start()
        fleet.store.answers.clear()
        jobs = [fleet.submit(f"job {index}") for index in range(3)]
        wait_until(lambda: len([one for one in fleet.store.received if one.method == "PUT"]) >= 3)
        (worker,) = fleet.workers
        worker.send(signal.SIGTERM)
        assert worker.process.wait(1.0 + EXIT_MARGIN_S + 25) == 0, worker.last_lines()
        assert [fleet.events(job_id)[-1] for job_id in jobs] == ["released"] * 3
        assert [fleet.job(job_id).attempts_left for job_id in jobs] == [3] * 3


def test_a_hung_job_takes_its_process_with_it_and_another_worker_goes_on(tmp_path: Path, migrated_file: Path) -> None:
    with fleet_in(tmp_path, migrated_file, worker__stall_floor_s=8.0, jobs__max_attempts=1) as fleet:
        fleet.start()
        fleet.store.answers.clear()
        uploading = fleet.submit("a job whose upload is under way")
        wait_until(lambda: any(one.method == "PUT" for one in fleet.store.received))
        hung = fleet.submit(HANGS)
        wait_until(lambda: HANGS in fleet.generated)
        fleet.store.answers.set()
        (first,) = fleet.workers
        assert first.process.wait(60) == BROKEN_STATUS, first.last_lines()
        assert fleet.events(hung) == ["queued", "claimed", "retry_scheduled"]
        assert fleet.timeline(hung)[-1].detail["code"] == "stalled"
        assert fleet.events(uploading) == ["queued", "claimed", "succeeded"]


def test_a_hung_job_is_canceled_and_its_worker_exits_in_time(tmp_path: Path, migrated_file: Path) -> None:
    with fleet_in(tmp_path, migrated_file, worker__shutdown_grace_s=1.0) as fleet:
        fleet.start()
        hung = fleet.submit(HANGS)
        wait_until(lambda: fleet.job(hung).progress_phase == "denoise")
        with fleet.database.write() as transaction:
            lifecycle.cancel(transaction, hung)
        wait_until(lambda: fleet.job(hung).status == "canceled")
        (worker,) = fleet.workers
        assert worker.process.poll() is None
        worker.send(signal.SIGTERM)
        assert worker.process.wait(1.0 + EXIT_MARGIN_S + 25) == BROKEN_STATUS, worker.last_lines()


def test_the_job_of_a_killed_worker_runs_again_within_the_lease_and_two_seconds(
    tmp_path: Path, migrated_file: Path
) -> None:
    with fleet_in(tmp_path, migrated_file) as fleet:
        fleet.start(2)
        fleet.hold.touch()
        job_id = fleet.submit("a job whose worker is killed")
        wait_until(lambda: fleet.job(job_id).status == "running")
        fleet.workers[holder(fleet, job_id)].send(signal.SIGKILL)
        fleet.hold.unlink()
        wait_until(lambda: fleet.has_ended(job_id))
        queued, claimed, rescued, again, succeeded = fleet.timeline(job_id)
        assert [event.type for event in (rescued, again, succeeded)] == ["rescued", "claimed", "succeeded"]
        margin_s = 3.0  # for a loaded machine
        assert (again.at - rescued.at).total_seconds() < 2.0 + margin_s
        assert (rescued.at - claimed.at).total_seconds() >= LEASE_S
        assert queued.at <= claimed.at


POISONED = ["queued", "claimed", "rescued", "claimed", "rescued", "claimed", "rescued", "claimed", "failed"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_job_that_kills_its_worker_harms_no_neighbor(tmp_path: Path, migrated_file: Path, workers: int) -> None:
    with fleet_in(tmp_path, migrated_file) as fleet:
        fleet.store.delay_s = 0.3
        fleet.start(workers)
        fleet.hold.touch()
        before = [fleet.submit(f"job {index}") for index in range(5)]
        poison = fleet.submit(POISON)
        neighbors = before + [fleet.submit(f"job {index}") for index in range(5, 20)]
        fleet.hold.unlink()

        def all_have_ended() -> bool:
            fleet.restart_dead(workers)
            return fleet.has_ended(poison, *neighbors)

        wait_until(all_have_ended, timeout_s=240, every_s=0.2)
        assert (fleet.job(poison).status, fleet.job(poison).error_code) == ("failed", "poison")
        assert fleet.events(poison) == POISONED
        assert {fleet.job(job_id).status for job_id in neighbors} == {"succeeded"}
        ways = {tuple(fleet.events(job_id)) for job_id in neighbors}
        assert ways <= {("queued", "claimed", "succeeded"), ("queued", "claimed", "rescued", "claimed", "succeeded")}


def holder(fleet: Fleet, job_id: UUID) -> int:
    """Return the index of the worker that has a job."""
    process_id = int(str(fleet.job(job_id).worker).rpartition(":")[2])
    return next(index for index, worker in enumerate(fleet.workers) if worker.process.pid == process_id)

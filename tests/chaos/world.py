"""One installation under test: services, links, and our own processes, which a supervisor starts again when they end.

Only the main thread starts processes, because they end with the thread that started them. It spends all its waiting in
`World.pass_time`, which supervises, takes samples and reads the database.
"""

import contextlib
import io
import os
import random
import signal
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from sqlalchemy import make_url

from tests.acceptance.installation import WEBHOOK_SECRET
from tests.chaos.facts import Sample, Seen
from tests.chaos.hooks import Hooks
from tests.chaos.network import NORMAL, Link, Loop
from tests.chaos.stores import UNAVAILABLE, FolderStore, ServerStore, Store
from tests.conftest import migrate
from tests.integration.installation import TREE, Installation
from tests.services import clock, process
from tests.services import postgres as postgres_server
from tests.services import redis as redis_server
from tests.services import s3 as s3_server
from tests.services.clock import Clock
from tests.services.postgres import Postgres
from tests.services.process import Running
from tests.services.redis import Redis
from tests.services.s3 import Bucket
from tests.services.service import Service

KEYS = {"anna": "the-key-of-anna-1", "ben": "the-key-of-ben-22", "probe": "the-key-of-the-probe"}
ROLES = ("api", "worker", "maintenance")
APIS = 2
DISK = "size=64m,mode=700"
LEASE_S = 8
SETTINGS: dict[str, Any] = {
    "jobs.lease_s": LEASE_S,
    "webhooks.timeout_s": 4,
    "webhooks.retry_schedule_s": [1, 2, *([5] * 60)],
    "webhooks.secret": WEBHOOK_SECRET,
    "server.api_keys": KEYS,
    "worker.maintenance": False,
}
STATES = "SELECT id, status FROM jobs WHERE completed_at IS NOT NULL"
SAMPLE_EVERY_S = 2.5
READ_EVERY_S = 5.0
RESTART_AFTER_S = 0.5


@dataclass
class Slot:
    """One of our processes: started again when it ends, unless a fault holds it down."""

    name: str
    role: str
    start: Callable[[], Running]
    clock: Clock | None = None
    running: Running | None = None
    held_down: bool = False
    ended_at: float | None = None
    ends: int = 0
    unexpected: list[int] = field(default_factory=list[int])
    """The statuses with which it ended although no fault ended it."""
    _is_ending: bool = False

    def supervise(self) -> None:
        """Start the process if it should run and does not."""
        if self.running is not None and (status := self.running.process.poll()) is not None:
            self.running, self.ended_at = None, time.monotonic()
            self.ends += 1
            if not self._is_ending:
                self.unexpected.append(status)
            self._is_ending = False
        waited = self.ended_at is None or time.monotonic() - self.ended_at > RESTART_AFTER_S
        if self.running is None and not self.held_down and waited:
            self.running = self.start()

    def signal(self, number: int) -> None:
        """Send a signal to the process, if there is one."""
        if self.running is not None:
            self._is_ending |= number in (signal.SIGKILL, signal.SIGTERM)
            self.running.send(number)


@dataclass
class Servers:
    """The services of an installation on several hosts."""

    postgres: Postgres
    postgres_service: Service
    database: str
    redis: Redis
    redis_service: Service
    bucket: Bucket
    s3_service: Service
    clock: Clock | None
    """That of PostgreSQL."""

    @property
    def address(self) -> str:
        """Address of the database for psycopg, not through any link."""
        url = self.postgres.url.set(drivername="postgresql", database=self.database)
        return url.render_as_string(hide_password=False)


@dataclass
class World:
    """Everything that a fault may act on, and what was seen so far."""

    folder: Path
    loop: Loop
    random: random.Random
    url: str
    """Address of the API behind the link that stands for a load balancer."""
    hooks: Hooks
    slots: list[Slot]
    store: Store
    servers: Servers | None
    links: Mapping[tuple[str, str], Link]
    """The link of each role to each service: `links["api", "database"]`."""
    samples: list[Sample] = field(default_factory=list[Sample])
    seen: list[Seen] = field(default_factory=list[Seen])
    _sample_at: float = 0.0
    _read_at: float = 0.0
    _last: dict[str, str] = field(default_factory=dict[str, str])

    def of_role(self, role: str) -> list[Slot]:
        """Return the processes of a role."""
        return [slot for slot in self.slots if slot.role == role]

    def links_to(self, service: str) -> list[Link]:
        """Return the links of all roles to a service."""
        return [link for (_, name), link in self.links.items() if name == service]

    def some_links_to(self, service: str) -> list[Link]:
        """Return the links of all roles to a service, or of one role, by chance."""
        every = self.links_to(service)
        return every if self.random.random() < 0.5 else [self.random.choice(every)]

    def pass_time(self, duration_s: float, until: Callable[[], bool] = lambda: False, every_s: float = 0.05) -> bool:
        """Supervise, sample and read for this long, or until a condition holds; return whether it does."""
        deadline = time.monotonic() + duration_s
        while not (found := until()) and time.monotonic() < deadline:
            for slot in self.slots:
                slot.supervise()
            now = time.monotonic()
            if now > self._sample_at:
                self._sample_at = now + SAMPLE_EVERY_S
                self.samples += [sample for slot in self.slots if (sample := _sample(slot, now)) is not None]
            if now > self._read_at:
                self._read_at = now + READ_EVERY_S
                self._read_states()
            time.sleep(min(every_s, duration_s))
        return found

    def all_present(self) -> bool:
        """Return whether every API answers and every worker is present."""
        try:
            answers = [httpx.get(f"{self.url}/health/ready", timeout=5) for _ in self.of_role("api")]
        except httpx.TransportError:
            return False
        present = len(self.of_role("worker"))
        return all(answer.is_success and answer.json()["workers"] >= present for answer in answers)

    def heal(self) -> None:
        """Undo what a fault may have left: links pass again, clocks are right, processes go on and may start."""
        for link in self.links.values():
            link.behave(NORMAL)
        for adjusted in self._clocks():
            adjusted.set(0)
        for slot in self.slots:
            slot.held_down = False
            slot.signal(signal.SIGCONT)

    def _clocks(self) -> list[Clock]:
        every = [slot.clock for slot in self.slots] + ([self.servers.clock] if self.servers else [])
        return [found for found in every if found is not None]

    def _read_states(self) -> None:
        """Note every terminal state that was not seen before, or that has changed."""
        with contextlib.suppress(*UNAVAILABLE):
            for identifier, status in self.store.rows(STATES):
                job_id = str(UUID(str(identifier)))
                if self._last.get(job_id) != status:
                    self._last[job_id] = status
                    self.seen.append(Seen(job_id, status))


@contextmanager
def servers(clock: Clock | None = None) -> Generator[Servers]:
    """Run PostgreSQL, Redis and SeaweedFS, with an empty database at the newest revision and an empty bucket."""
    # A commit must survive an immediate restart, as it would on a disk.
    with (
        postgres_server.restartable(clock.prefix if clock else (), synchronous_commit="on") as (
            postgres,
            postgres_service,
        ),
        redis_server.restartable() as (redis, redis_service),
        s3_server.restartable() as (s3, s3_service),
        s3.bucket() as bucket,
        postgres.database() as url,
    ):
        migrate(url)
        name = make_url(url).database
        assert name is not None
        yield Servers(postgres, postgres_service, name, redis, redis_service, bucket, s3_service, clock)


@contextmanager
def fleet(
    folder: Path, loop: Loop, seed: int, workers: int = 2, with_clocks: bool = False, beside: str = "", **more: Any
) -> Generator[World]:
    """Run an installation on several hosts: two APIs behind one port, workers and maintenance, each behind links.

    `with_clocks` gives each of them, and PostgreSQL, a clock that a fault may set. `beside` is a git revision of which
    one more API and one more worker run. `more` adds settings by dotted name.
    """
    with _clocks(with_clocks) as new_clock, servers(new_clock("postgres")) as services, _tree_of(beside) as other_tree:
        redis_url, endpoint = make_url(services.redis.url), make_url(services.bucket.endpoint_url)
        ports = {"database": services.postgres.url.port, "broker": redis_url.port, "storage": endpoint.port}
        links = {
            (role, service): Link(loop, port, seed=seed)
            for role in ROLES
            for service, port in ports.items()
            if port is not None
        }
        api_ports = process.free_ports(APIS)
        other_port = process.free_port()
        balancer = Link(loop, *api_ports, *([other_port] if other_tree else []))
        url = f"http://127.0.0.1:{balancer.port}"

        def slot(name: str, role: str, package: str, *arguments: str, tree: Path = TREE, port: int = 0) -> Slot:
            database = services.postgres.url.set(port=links[role, "database"].port, database=services.database)
            given = {
                **SETTINGS,
                "database.url": database.render_as_string(hide_password=False),
                "broker.url": redis_url.set(port=links[role, "broker"].port).render_as_string(hide_password=False),
                "storage.bucket": services.bucket.name,
                "storage.endpoint_url": f"http://127.0.0.1:{links[role, 'storage'].port}",
                "storage.access_key_id": services.bucket.access_key_id,
                "storage.secret_access_key": services.bucket.secret_access_key,
                "server.public_url": url,
                **more,
            }
            own = Installation(folder, {**given, **({"server.port": port} if port else {})}, tree=tree)
            return _slot(own, name, role, package, *arguments, clock=new_clock(name))

        slots = [
            *(slot(f"api-{n}", "api", "server", port=port) for n, port in enumerate(api_ports)),
            *(slot(f"worker-{n}", "worker", "tests.chaos.stand_in_worker") for n in range(workers)),
            slot("maintenance", "maintenance", "worker", "maintenance"),
        ]
        if other_tree:
            slots.append(slot("api-other", "api", "server", tree=other_tree, port=other_port))
            slots.append(slot("worker-other", "worker", "tests.chaos.stand_in_worker", tree=other_tree))
        store = ServerStore(services.address, services.bucket)
        hooks, source = Hooks(loop), random.Random(seed)
        with _running(World(folder, loop, source, url, hooks, slots, store, services, links)) as world:
            yield world


@contextmanager
def embedded(folder: Path, loop: Loop, seed: int, with_clocks: bool = False) -> Generator[World]:
    """Run an installation in one folder, as `make run` does: SQLite, the folder broker, images in a folder.

    Root gets a small file system for the folder, which a fault may fill. `with_clocks` gives its processes a clock that
    a fault may set.
    """
    with ExitStack() as stack:
        if os.geteuid() == 0:
            subprocess.run(["mount", "-t", "tmpfs", "-o", DISK, "tmpfs", folder], check=True)
            stack.callback(subprocess.run, ["umount", "--lazy", folder], check=True)
        migrate(f"sqlite:///{folder / 'zimage.db'}")
        port = process.free_port()
        given = {**SETTINGS, "worker.maintenance": True, "server.port": port}
        installation = Installation(folder, given)
        clock = stack.enter_context(_clocks(with_clocks))("host")
        slots = [
            _slot(installation, "api", "api", "server", clock=clock),
            _slot(installation, "worker", "worker", "tests.chaos.stand_in_worker", clock=clock),
        ]
        url, source = f"http://127.0.0.1:{port}", random.Random(seed)
        world = World(folder, loop, source, url, Hooks(loop), slots, FolderStore(folder), None, {})
        yield stack.enter_context(_running(world))


@contextmanager
def _running(world: World) -> Generator[World]:
    with ExitStack() as stack:
        for slot in world.slots:
            stack.callback(_end, slot)
        yield world


def _end(slot: Slot) -> None:
    if slot.running is not None:
        slot.signal(signal.SIGCONT)
        slot.running.stop(signal.SIGKILL)


@contextmanager
def _clocks(are_wanted: bool) -> Generator[Callable[[str], Clock | None]]:
    if are_wanted:
        with clock.adjustable() as new_clock:
            yield new_clock
    else:
        yield lambda _name: None


@contextmanager
def _tree_of(revision: str) -> Generator[Path | None]:
    """Yield a folder with the files of a git revision; None if none is named."""
    if not revision:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="zimage-tree-") as name:
        archive = subprocess.run(["git", "archive", revision], cwd=TREE, stdout=subprocess.PIPE, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(name, filter="data")
        yield Path(name)


def _slot(installation: Installation, name: str, role: str, package: str, *arguments: str, clock: Clock | None) -> Slot:
    own = replace(installation, prefix=clock.prefix if clock else ())
    return Slot(name, role, lambda: own.start(package, name, *arguments), clock)


def _sample(slot: Slot, now: float) -> Sample | None:
    """Return the resources of a process from /proc, or None if there is no process."""
    if slot.running is None:
        return None
    pid = slot.running.process.pid
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        rss_kib = int(status.partition("VmRSS:")[2].split()[0])
        threads = int(status.partition("Threads:")[2].split()[0])
        names = [os.readlink(entry) for entry in _descriptors(pid)]
    except (OSError, IndexError):
        return None
    sockets = sum(1 for name in names if name.startswith("socket:"))
    return Sample(slot.name, pid, now, rss_kib * 1024, len(names), threads, sockets)


def _descriptors(pid: int) -> list[Path]:
    return list(Path(f"/proc/{pid}/fd").iterdir())

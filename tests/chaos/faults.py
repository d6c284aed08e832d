"""The faults, by name. Each acts on a world, lasts a few seconds of `World.pass_time`, and undoes itself."""

import contextlib
import os
import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
import redis
from sqlalchemy import make_url

from tests.chaos.network import NORMAL, Behavior, Link, http_answer
from tests.chaos.world import LEASE_S, Servers, Slot, World
from tests.conftest import migrate
from tests.services import clock, postgres
from tests.services.clock import Clock
from tests.services.process import Running

Act = Callable[[World], None]
MOST_NOTIFICATIONS = 200
SERVICES = ("database", "broker", "storage")
FARTHEST_HOST_S = 2 * 86_400
"""Farther than idempotency keys live."""
FARTHEST_DATABASE_S = 6 * 3600
"""Less than anything is retained: whatever the database's clock says is over is deleted."""
COMMITS_LOST = Behavior(loses_answers_to=b"COMMIT", loss_rate=0.3)
XML_ERROR = b'<?xml version="1.0"?><Error><Code>%s</Code><Message>by a test</Message></Error>'


@dataclass(frozen=True)
class Fault:
    """One fault; `group` selects several at once, such as all of the storage."""

    name: str
    group: str
    act: Act


def _lasting(world: World) -> float:
    return world.random.uniform(2, 8)


# Links


def _behaving(service: str, behavior: Behavior) -> Act:
    def act(world: World) -> None:
        links = world.some_links_to(service)
        with _each(links, behavior):
            world.pass_time(_lasting(world))

    return act


@contextmanager
def _each(links: list[Link], behavior: Behavior) -> Generator[None]:
    for link in links:
        link.behave(behavior)
    try:
        yield
    finally:
        for link in links:
            link.behave(NORMAL)


def _cut(service: str) -> Act:
    def act(world: World) -> None:
        for link in world.some_links_to(service):
            link.cut()

    return act


def _cut_often(service: str) -> Act:
    def act(world: World) -> None:
        for _ in range(world.random.randint(5, 15)):
            for link in world.some_links_to(service):
                link.cut()
            world.pass_time(world.random.uniform(0.1, 0.8))

    return act


def _half_close(service: str) -> Act:
    def act(world: World) -> None:
        for link in world.some_links_to(service):
            link.half_close()
        world.pass_time(_lasting(world))

    return act


# Processes


def _signaled(role: str, number: signal.Signals) -> Act:
    def act(world: World) -> None:
        world.random.choice(world.of_role(role)).signal(number)
        world.pass_time(1)

    return act


def _stopped(role: str) -> Act:
    """Stop a process for up to two leases, as a machine that swaps or a debugger does."""

    def act(world: World) -> None:
        slot = world.random.choice(world.of_role(role))
        with _suspended([slot.running] if slot.running else []):
            world.pass_time(world.random.uniform(1, 2 * LEASE_S))

    return act


@contextmanager
def _suspended(processes: list[Running]) -> Generator[None]:
    for running in processes:
        running.send(signal.SIGSTOP)
    try:
        yield
    finally:
        for running in processes:
            running.send(signal.SIGCONT)


def _power_cut(world: World) -> None:
    for slot in world.slots:
        slot.signal(signal.SIGKILL)
    if world.servers is not None:
        world.servers.redis_service.restart(signal.SIGKILL)
        world.servers.postgres_service.restart(signal.SIGQUIT)
    world.pass_time(1)


def _rolling_restart(role: str) -> Act:
    def act(world: World) -> None:
        for slot in world.of_role(role):
            _leave_and_return(world, slot)

    return act


def _leave_and_return(world: World, slot: Slot) -> None:
    before = slot.running
    slot.signal(signal.SIGTERM)
    world.pass_time(30, until=lambda: slot.running is not None and slot.running is not before)
    world.pass_time(4)


# Database


def _restarted_database(number: signal.Signals) -> Act:
    return lambda world: _servers(world).postgres_service.restart(number)


def _hung_database(world: World) -> None:
    """Suspend PostgreSQL and all its backends."""
    with postgres.frozen(_servers(world).postgres_service):
        world.pass_time(_lasting(world))


def _terminated_backends(world: World) -> None:
    for _ in range(3):
        _execute(world, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
                        " AND pid <> pg_backend_pid()")  # fmt: skip
        world.pass_time(1)


def _read_only_database(world: World) -> None:
    """Be what clients see on a standby after a failover."""
    name = _servers(world).database
    try:
        _execute(world, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        _terminated_backends(world)
        world.pass_time(_lasting(world))
    finally:
        _execute(world, f"SET default_transaction_read_only = off; ALTER DATABASE {name} RESET ALL")
        _terminated_backends(world)


def _full_database(world: World) -> None:
    """Take every connection that PostgreSQL has left, as another application would."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(psycopg.OperationalError):
            for _ in range(300):
                stack.enter_context(psycopg.connect(_servers(world).address, connect_timeout=5))
        for link in world.links_to("database"):
            link.cut()
        world.pass_time(_lasting(world))


def _locked_table(world: World) -> None:
    """Hold the lock that a migration would take: every statement on jobs waits, and pools run out."""
    with psycopg.connect(_servers(world).address) as connection:
        connection.execute("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE")
        world.pass_time(_lasting(world))


def _migrated_again(world: World) -> None:
    servers = _servers(world)
    migrate(servers.postgres.url.set(database=servers.database).render_as_string(hide_password=False))


def _execute(world: World, statements: str) -> None:
    with psycopg.connect(_servers(world).address, autocommit=True, connect_timeout=5) as connection:
        for statement in statements.split(";"):
            connection.execute(statement.encode())


# Broker


def _flushed_broker(world: World) -> None:
    for _ in range(3):
        _servers(world).redis.flush()
        world.pass_time(1)


def _doubled_notifications(world: World) -> None:
    client: Any = redis.Redis(port=make_url(_servers(world).redis.url).port or 0)  # its annotations are incomplete
    with client:
        for _ in range(20):
            for key in client.scan_iter(_type="list"):
                if client.llen(key) < MOST_NOTIFICATIONS:  # nobody may be there to read them
                    for message in client.lrange(key, 0, -1):
                        client.lpush(key, *[message] * 5)
            world.pass_time(0.2)


def _hung(service: Callable[[Servers], Running]) -> Act:
    def act(world: World) -> None:
        with _suspended([service(_servers(world))]):
            world.pass_time(_lasting(world))

    return act


# Storage


def _answering(status: int, reason: str, code: bytes) -> Act:
    return _behaving("storage", Behavior(answers=http_answer(status, reason, XML_ERROR % code)))


def _killed_storage(world: World) -> None:
    _servers(world).s3_service.restart(signal.SIGKILL)


def _long_outage(world: World) -> None:
    """Keep the bucket away for longer than three attempts with their delays take."""
    with _each(world.links_to("storage"), Behavior(refuses=True)):
        world.pass_time(35)


def _kills_during_outage(world: World) -> None:
    with _each(world.links_to("storage"), Behavior(refuses=True)):
        world.pass_time(_lasting(world))
        world.random.choice(world.of_role("worker")).signal(signal.SIGKILL)
        world.pass_time(_lasting(world))


# Clocks


def _wrong_clock(role: str) -> Act:
    """Set one host's clock ahead or back, and later right again."""

    def act(world: World) -> None:
        with _set(world.random.choice(world.of_role(role)).clock, _some_offset_s(world, FARTHEST_HOST_S)):
            world.pass_time(_lasting(world))

    return act


def _wrong_database_clock(world: World) -> None:
    with _set(_servers(world).clock, _some_offset_s(world, FARTHEST_DATABASE_S)):
        world.pass_time(_lasting(world))


def _database_clock_set_back(world: World) -> None:
    """Set the database's clock back when processes die, whose leases then seem to last for hours."""
    with _set(_servers(world).clock, FARTHEST_DATABASE_S):
        world.pass_time(_lasting(world))
        _kill_leaseholders(world)


def _wrong_host_clock(world: World) -> None:
    """Set the only host's clock, which is also the database's."""
    with _set(world.slots[0].clock, _some_offset_s(world, FARTHEST_DATABASE_S)):
        world.pass_time(_lasting(world))


def _host_clock_set_back(world: World) -> None:
    with _set(world.slots[0].clock, FARTHEST_DATABASE_S):
        world.pass_time(_lasting(world))
        _kill_leaseholders(world)


def _kill_leaseholders(world: World) -> None:
    world.random.choice(world.of_role("worker")).signal(signal.SIGKILL)
    for slot in world.of_role("maintenance"):
        slot.signal(signal.SIGKILL)


def _some_offset_s(world: World, farthest_s: int) -> int:
    return world.random.choice((-1, 1)) * world.random.randint(60, farthest_s)


@contextmanager
def _set(clock: Clock | None, offset_s: int) -> Generator[None]:
    assert clock is not None, "this fault needs clocks that may be set: install libfaketime"
    clock.set(offset_s)
    try:
        yield
    finally:
        clock.set(0)


# Receivers


def _failing_receiver(world: World) -> None:
    world.hooks.answer(500)
    world.pass_time(_lasting(world))
    world.hooks.answer(200)


def _hanging_receiver(world: World) -> None:
    world.hooks.hang()
    world.pass_time(_lasting(world))
    world.hooks.answer(200)


# One folder


def _full_disk(world: World) -> None:
    """Fill the file system of the data folder to the last byte."""
    assert os.path.ismount(world.folder), "only root can give the data folder a file system that may be filled"
    filler = world.folder / "filler"
    try:
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        world.pass_time(_lasting(world))
    finally:
        filler.unlink(missing_ok=True)


def _broken_notifications(world: World) -> None:
    """Leave what a process that died, or a full disk, leaves in the broker's folder: files without their end."""
    for number, content in enumerate((b"", b"{")):
        (world.folder / "broker" / "queue" / f"{number}_x.zimage.generate.msg").write_bytes(content)
        world.pass_time(2)


def _servers(world: World) -> Servers:
    assert world.servers is not None, "this fault needs servers"
    return world.servers


def _on_every_service() -> list[Fault]:
    found: list[Fault] = []
    for service in SERVICES:
        for name, act in {
            "refuses": _behaving(service, Behavior(refuses=True)),
            "frozen": _behaving(service, Behavior(frozen=True)),
            "slow": _behaving(service, Behavior(delay_s=0.15)),
            "cut": _cut(service),
            "cut_often": _cut_often(service),
            "half_closed": _half_close(service),
        }.items():
            found.append(Fault(f"{service}_{name}", service, act))
    return found


def _on_every_role() -> list[Fault]:
    found: list[Fault] = []
    for role in ("api", "worker", "maintenance"):
        found.append(Fault(f"{role}_killed", "process", _signaled(role, signal.SIGKILL)))
        found.append(Fault(f"{role}_terminated", "process", _signaled(role, signal.SIGTERM)))
        found.append(Fault(f"{role}_stopped", "process", _stopped(role)))
    return found


FAULTS = {
    fault.name: fault
    for fault in (
        *_on_every_service(),
        *_on_every_role(),
        Fault("power_cut", "process", _power_cut),
        Fault("workers_rolled", "process", _rolling_restart("worker")),
        Fault("apis_rolled", "process", _rolling_restart("api")),
        Fault("database_commit_lost", "database", _behaving("database", COMMITS_LOST)),
        Fault("database_restarted", "database", _restarted_database(signal.SIGINT)),
        Fault("database_crashed", "database", _restarted_database(signal.SIGQUIT)),
        Fault("database_hangs", "database", _hung_database),
        Fault("database_backends_terminated", "database", _terminated_backends),
        Fault("database_read_only", "database", _read_only_database),
        Fault("database_full", "database", _full_database),
        Fault("database_locked", "database", _locked_table),
        Fault("database_migrated_again", "database", _migrated_again),
        Fault("broker_flushed", "broker", _flushed_broker),
        Fault("broker_doubles", "broker", _doubled_notifications),
        Fault("broker_hangs", "broker", _hung(lambda servers: servers.redis_service.running)),
        Fault("broker_killed", "broker", lambda world: _servers(world).redis_service.restart(signal.SIGKILL)),
        Fault("broker_restarted", "broker", lambda world: _servers(world).redis_service.restart()),
        Fault("broker_answers_lost", "broker", _behaving("broker", Behavior(loses_answers_to=b"PUSH"))),
        Fault("broker_late", "broker", _behaving("broker", Behavior(delay_s=1.5))),
        Fault("storage_500", "storage", _answering(500, "Internal Server Error", b"InternalError")),
        Fault("storage_503", "storage", _answering(503, "Slow Down", b"SlowDown")),
        Fault("storage_put_lost", "storage", _behaving("storage", Behavior(loses_answers_to=b"PUT /"))),
        Fault("storage_delete_lost", "storage", _behaving("storage", Behavior(loses_answers_to=b"DELETE /"))),
        Fault("storage_killed", "storage", _killed_storage),
        Fault("storage_hangs", "storage", _hung(lambda servers: servers.s3_service.running)),
        Fault("storage_away_35_s", "storage", _long_outage),
        Fault("storage_away_and_kill", "storage", _kills_during_outage),
        Fault("api_clock_wrong", "clock", _wrong_clock("api")),
        Fault("worker_clock_wrong", "clock", _wrong_clock("worker")),
        Fault("maintenance_clock_wrong", "clock", _wrong_clock("maintenance")),
        Fault("database_clock_wrong", "clock", _wrong_database_clock),
        Fault("database_clock_set_back", "clock", _database_clock_set_back),
        Fault("host_clock_wrong", "clock", _wrong_host_clock),
        Fault("host_clock_set_back", "clock", _host_clock_set_back),
        Fault("disk_full", "folder", _full_disk),
        Fault("notifications_broken", "folder", _broken_notifications),
        Fault("receiver_fails", "receiver", _failing_receiver),
        Fault("receiver_hangs", "receiver", _hanging_receiver),
    )
}


def selected(names: str, embedded: bool) -> list[Fault]:
    """Return the faults of a comma-separated list of names and groups; `all` is every one. Raises `KeyError`.

    Groups contain only what an installation on servers, or in one folder, has.
    """
    possible = [fault for fault in FAULTS.values() if _is_possible(fault, embedded)]
    found: list[Fault] = []
    for name in names.split(","):
        found += [fault for fault in possible if name in ("all", fault.group)] or [FAULTS[name]]
    return found


def _is_possible(fault: Fault, embedded: bool) -> bool:
    if fault.group == "clock":
        return clock.installed() is not None and fault.name.startswith("host") == embedded
    if not embedded:
        return fault.group != "folder"
    if fault.name == "disk_full" and os.geteuid() != 0:
        return False  # only root can give the folder a file system of its own
    in_folder = fault.group in ("folder", "receiver", "process")
    return in_folder and not fault.name.startswith(("maintenance", "workers", "apis"))

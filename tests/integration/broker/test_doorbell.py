"""The bell: a ring wakes a worker, and nothing that befalls a broker reaches who rings."""

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from kombu import Connection

from tests.integration.broker.cable import cable_to
from tests.integration.installation import Installation
from tests.services.redis import Redis
from tests.waiting import wait_until
from zcore.broker import DRAIN_TASK, PENDING_RINGS, Doorbell, make_app, queue_of
from zcore.settings import Settings
from zcore.stages import Stage


@pytest.fixture(params=["folder", "redis"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """An installation with either broker."""
    url = request.getfixturevalue("redis_url") if request.param == "redis" else ""
    return Installation(tmp_path, {"broker.url": url}).settings


@pytest.fixture
def rings(settings: Settings) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """What has arrived in the queue since the last look."""
    app = make_app(settings)
    options = app.conf.broker_transport_options
    with Connection(app.conf.broker_url, transport_options=options) as connection:
        queue = connection.SimpleQueue(queue_of(Stage.GENERATE))

        def arrived() -> list[dict[str, Any]]:
            found = []
            try:
                while True:
                    message = queue.get(timeout=0.2)
                    found.append(message.headers)
                    message.ack()
            except queue.Empty:
                return found

        yield arrived
        queue.close()


def test_a_ring_arrives_and_says_nothing_but_that(
    settings: Settings, rings: Callable[[], list[dict[str, Any]]]
) -> None:
    with closing(Doorbell(make_app(settings))) as doorbell:
        doorbell.announce(Stage.GENERATE)
        (ring,) = wait_until(rings)
    assert ring["task"] == DRAIN_TASK
    assert ring["argsrepr"] == "()"
    assert ring["expires"] is not None


def test_closing_rings_what_is_pending(settings: Settings, rings: Callable[[], list[dict[str, Any]]]) -> None:
    doorbell = Doorbell(make_app(settings))
    for _ in range(5):
        doorbell.announce(Stage.GENERATE)
    doorbell.close()
    assert len(rings()) == 5


@pytest.mark.timeout(30)
@pytest.mark.parametrize("way", ["cut", "hold"])
def test_ringing_a_dead_or_hung_broker_takes_no_time_and_raises_nothing(tmp_path: Path, redis: Redis, way: str) -> None:
    """Waiting for it would take seconds a ring."""
    with cable_to(_port(redis.url)) as cable:
        getattr(cable, way)()
        near = Installation(tmp_path, {"broker.url": f"redis://127.0.0.1:{cable.port}/0"}).settings
        with closing(Doorbell(make_app(near))) as doorbell:
            for _ in range(2 * PENDING_RINGS):
                doorbell.announce(Stage.GENERATE)


def test_the_bell_rings_again_when_its_broker_is_back(tmp_path: Path, redis: Redis, redis_url: str) -> None:
    with cable_to(_port(redis_url)) as cable:
        near = Installation(tmp_path, {"broker.url": f"redis://127.0.0.1:{cable.port}/0"}).settings
        with closing(Doorbell(make_app(near))) as doorbell, Connection(redis_url) as connection:
            cable.cut()
            doorbell.announce(Stage.GENERATE)
            cable.plug()
            doorbell.announce(Stage.GENERATE)
            wait_until(lambda: length(connection) >= 1)


def test_an_error_of_any_kind_does_not_end_the_bell(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full or read-only Redis answers with errors that are neither of the network nor of the operating system."""
    app = make_app(settings)
    rung = threading.Event()
    answers = iter([RuntimeError("OOM command not allowed when used memory > 'maxmemory'")])

    def send_task(*_: object, **__: object) -> None:
        for error in answers:
            raise error
        rung.set()

    monkeypatch.setattr(app, "send_task", send_task)
    with closing(Doorbell(app)) as doorbell:
        doorbell.announce(Stage.GENERATE)
        doorbell.announce(Stage.GENERATE)
        wait_until(rung.is_set)


def length(connection: Connection) -> int:
    """How many rings wait in Redis."""
    size: int = connection.default_channel.client.llen(f"zimage:{queue_of(Stage.GENERATE)}")
    return size


def _port(url: str) -> int:
    return int(url.rpartition(":")[2].partition("/")[0])

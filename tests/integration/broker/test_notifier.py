"""Notifier: notifications arrive, and no fault of the broker reaches the publisher."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import redis
from celery.contrib.testing.worker import start_worker
from kombu import Connection, Message

from tests.integration.broker.tcp_proxy import proxy_to
from tests.integration.installation import Installation
from tests.services.redis import Redis
from tests.waiting import wait_until
from zcore.broker import DRAIN_TASK, MAX_PENDING_NOTIFICATIONS, Notifier, make_app, queue_name
from zcore.settings import Settings
from zcore.stages import Stage


@pytest.fixture(params=["folder", "redis"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """Settings of an installation, once with each broker."""
    url = request.getfixturevalue("redis_url") if request.param == "redis" else ""
    return Installation(tmp_path, {"broker.url": url}).settings


@pytest.fixture
def received(settings: Settings) -> Iterator[Callable[[], list[Message]]]:
    """Function that returns the messages received since its last call."""
    with make_app(settings).connection() as connection:
        queue = connection.SimpleQueue(queue_name(Stage.GENERATE))

        def receive() -> list[Message]:
            found = []
            try:
                while True:
                    message = queue.get(timeout=0.2)
                    found.append(message)
                    message.ack()
            except queue.Empty:
                return found

        yield receive
        queue.close()


def test_a_notification_arrives_without_data(settings: Settings, received: Callable[[], list[Message]]) -> None:
    with closing(Notifier(make_app(settings))) as notifier:
        notifier.notify(Stage.GENERATE)
        (notification,) = wait_until(received)
    assert notification.headers["task"] == DRAIN_TASK
    assert notification.payload[:2] == [[], {}]
    assert notification.headers["expires"] is not None


def test_a_message_that_was_never_completed_is_removed_when_a_process_starts(tmp_path: Path) -> None:
    settings = Installation(tmp_path, {"broker.url": ""}).settings
    make_app(settings)
    folder = settings.data_path / "broker" / "queue"
    names = [f"1-{number}.{queue_name(Stage.GENERATE)}.draft" for number in range(2)]
    for name in names:
        (folder / name).touch()
    os.utime(folder / names[0], (0, 0))
    make_app(settings)
    assert [path.name for path in folder.iterdir()] == names[1:], "a process may be writing the young one"


def test_closing_publishes_what_is_pending(settings: Settings, received: Callable[[], list[Message]]) -> None:
    notifier = Notifier(make_app(settings))
    for _ in range(5):
        notifier.notify(Stage.GENERATE)
    notifier.close()
    assert len(received()) == 5


def test_repeated_notifications_do_not_pile_up(settings: Settings, received: Callable[[], list[Message]]) -> None:
    with closing(Notifier(make_app(settings))) as notifier:
        notifier.notify(Stage.GENERATE)
        for _ in range(10):
            notifier.notify_again(Stage.GENERATE, unread=3)
            notifier.notify_again(Stage.ENCODE, unread=2)
    assert len(received()) == 3
    with closing(Notifier(make_app(settings))) as notifier:
        notifier.notify_again(Stage.GENERATE, unread=1)
    assert len(received()) == 1, "the others were read"


@pytest.mark.timeout(30)
@pytest.mark.parametrize("failure", ["cut", "hold"])
def test_notifying_through_a_dead_or_hung_broker_neither_blocks_nor_raises(
    tmp_path: Path, redis: Redis, failure: str
) -> None:
    """Waiting for the broker would take seconds per notification."""
    with proxy_to(_port(redis.url)) as cable:
        getattr(cable, failure)()
        near = Installation(tmp_path, {"broker.url": f"redis://127.0.0.1:{cable.port}/0"}).settings
        with closing(Notifier(make_app(near))) as notifier:
            for _ in range(2 * MAX_PENDING_NOTIFICATIONS):
                notifier.notify(Stage.GENERATE)


def test_notifications_resume_when_the_broker_is_back(tmp_path: Path, redis: Redis, redis_url: str) -> None:
    with proxy_to(_port(redis_url)) as cable:
        near = Installation(tmp_path, {"broker.url": f"redis://127.0.0.1:{cable.port}/0"}).settings
        with closing(Notifier(make_app(near))) as notifier, Connection(redis_url) as connection:
            notifier.notify_again(Stage.ENCODE, 1)  # the connection that is cut has been used
            wait_until(lambda: queue_length(connection, Stage.ENCODE) == 1)
            cable.cut()
            notifier.notify(Stage.GENERATE)
            notifier.notify_again(Stage.GENERATE, 1)
            cable.plug()
            notifier.notify(Stage.GENERATE)
            wait_until(lambda: queue_length(connection) >= 1)
            notifier.notify_again(Stage.ENCODE, 2)
            wait_until(lambda: queue_length(connection, Stage.ENCODE) == 2)


def test_no_error_ends_the_notifier(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full or read-only Redis raises errors that are neither network nor operating system errors."""
    app = make_app(settings)
    published = threading.Event()
    answers = iter([RuntimeError("OOM command not allowed when used memory > 'maxmemory'")])

    def send_task(*_: object, **__: object) -> None:
        for error in answers:
            raise error
        published.set()

    monkeypatch.setattr(app, "send_task", send_task)
    with closing(Notifier(app)) as notifier:
        notifier.notify(Stage.GENERATE)
        notifier.notify(Stage.GENERATE)
        wait_until(published.is_set)


def queue_length(connection: Connection, stage: Stage = Stage.GENERATE) -> int:
    """Return the number of messages queued in Redis."""
    size: int = connection.default_channel.client.llen(f"zimage:{queue_name(stage)}")
    return size


def _port(url: str) -> int:
    return int(url.rpartition(":")[2].partition("/")[0])


def test_a_worker_takes_no_orders_from_whoever_reaches_the_broker(redis_url: str, tmp_path: Path) -> None:
    """A worker that Celery's own remote control asks to shut down goes on working."""
    app = make_app(Installation(tmp_path, {"broker.url": redis_url}).settings)
    drained = threading.Event()
    app.task(name=DRAIN_TASK)(drained.set)
    options: dict[str, Any] = {"pool": "solo", "perform_ping_check": False, "loglevel": "WARNING"}
    with (
        start_worker(app, queues=[queue_name(Stage.GENERATE)], **options),
        redis.Redis.from_url(redis_url) as client,
    ):
        app.control.broadcast("shutdown")
        assert [channel for channel in client.pubsub_channels() if b"pidbox" in channel] == []
        app.send_task(DRAIN_TASK, queue=queue_name(Stage.GENERATE))
        assert drained.wait(30)

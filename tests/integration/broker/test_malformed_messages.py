"""Whatever the broker delivers: it ends no worker, and a message that is not a notification is discarded."""

import json
import signal
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import redis as redis_client

from tests.integration.installation import TREE, Installation, events, has_logged
from tests.services import process
from tests.services.process import Running
from tests.waiting import wait_until
from worker.app import BROKEN_STATUS
from zcore.broker import Notifier, make_app, queue_name
from zcore.broker_transports import DRAIN_TASK, FolderChannel, notification
from zcore.stages import Stage

WORKER = "tests.integration.worker.stand_ins"
QUEUE = queue_name(Stage.GENERATE)
DELIVERY = {"delivery_tag": "1", "delivery_info": {"exchange": "", "routing_key": QUEUE}, "body_encoding": "base64"}
HEADERS = {"id": "1", "task": DRAIN_TASK, "expires": "2999-01-01T00:00:00+00:00"}
WELL_FORMED: dict[str, Any] = {
    "headers": HEADERS,
    "properties": DELIVERY,
    "body": "",
    "content-type": "application/json",
}


def changed(part: str, **fields: Any) -> dict[str, Any]:
    """Return a notification with other fields in one of its parts."""
    return {**WELL_FORMED, part: {**WELL_FORMED[part], **fields}}


NOT_JSON = [b"", b"{", b"\x00\xff\xfe", b"\x80\x04]\x94.", b"[" * 100_000, "\ufeff{}".encode()]
NOT_NOTIFICATIONS: list[Any] = [
    None,
    5,
    "text",
    [],
    {},
    {"headers": None, "properties": None},
    {"__type__": "decimal", "__value__": "no number"},
    {"__type__": "uuid", "__value__": 5},
    {"task": DRAIN_TASK, "id": "1", "args": [], "kwargs": {}},
    changed("headers", task="celery.backend_cleanup"),
    changed("headers", task=["a", "list"]),
    changed("headers", id=None),
    changed("headers", expires="never"),
    changed("properties", delivery_tag=None),
    changed("properties", delivery_info="none"),
]
ODD_NOTIFICATIONS: list[Any] = [
    changed("headers", eta=5, timelimit=3, stamped_headers=1, shadow=[1], group={}, retries="x"),
    changed("properties", body_encoding="rot13", priority="high", reply_to=[1]),
    {**WELL_FORMED, "body": "no base64", "content-type": "application/x-python-serialize", "content-encoding": 7},
]


@pytest.mark.parametrize("message", NOT_NOTIFICATIONS, ids=range(len(NOT_NOTIFICATIONS)))
def test_anything_else_is_not_a_notification(message: object) -> None:
    assert notification(message) is None


@pytest.mark.parametrize("message", ODD_NOTIFICATIONS, ids=range(len(ODD_NOTIFICATIONS)))
def test_only_what_a_notification_has_is_passed_on(message: object) -> None:
    found = notification(message)
    assert found is not None
    assert found["headers"] == HEADERS | {"expires": found["headers"]["expires"]}
    assert (found["content-type"], found["properties"]["body_encoding"]) == ("application/json", "base64")


@pytest.fixture(params=["folder", "redis"])
def installation(request: pytest.FixtureRequest, tmp_path: Path, sqlite_url: str) -> Installation:
    """An installation, once with each broker."""
    url = request.getfixturevalue("redis_url") if request.param == "redis" else ""
    given = {"broker.url": url, "database.url": sqlite_url, "worker.stages": ["generate"], "worker.maintenance": False}
    return Installation(tmp_path / "data", {**given, "jobs.split_encoding": True})


@pytest.fixture
def deliver(installation: Installation) -> Iterator[Callable[[bytes], None]]:
    """Function that puts bytes where the broker holds its messages."""
    url = installation.settings.broker.url
    if not url:
        folder = installation.folder / "broker" / "queue"

        def write(content: bytes) -> None:
            name = f"1_{uuid.uuid4()}.{QUEUE}.msg"
            (installation.folder / name).write_bytes(content)
            (installation.folder / name).replace(folder / name)

        yield write
        return
    with redis_client.Redis.from_url(url) as client:
        yield lambda content: client.lpush(f"zimage:{QUEUE}", content)


@pytest.fixture
def worker(installation: Installation) -> Iterator[Running]:
    """A worker process with a stand-in for its model."""
    installation.folder.mkdir()
    log = installation.folder / "worker.log"
    running = process.start([sys.executable, "-m", WORKER], log, environment=installation.environment, folder=TREE)
    try:
        wait_until(lambda: has_logged(running, "worker.started"), timeout_s=120)
        yield running
    finally:
        running.stop(signal.SIGKILL)


def test_no_message_ends_a_worker(
    installation: Installation, worker: Running, deliver: Callable[[bytes], None]
) -> None:
    messages = NOT_JSON + [json.dumps(message).encode() for message in NOT_NOTIFICATIONS + ODD_NOTIFICATIONS]
    for message in messages:
        deliver(message)
    expected = len(NOT_JSON) + len(NOT_NOTIFICATIONS)
    wait_until(lambda: discarded(worker) >= expected, timeout_s=60)
    worker.check()
    with closing(Notifier(make_app(installation.settings))) as notifier:
        notifier.notify(Stage.GENERATE)
        wait_until(lambda: unread(installation) == 0)
    assert discarded(worker) == expected
    worker.send(signal.SIGTERM)
    assert worker.process.wait(30) == 0


def test_a_worker_that_celery_ends_has_not_succeeded(tmp_path: Path, sqlite_url: str) -> None:
    """With an error of a kind that Celery does not handle, in place of one that nobody knows yet."""
    given = {"database.url": sqlite_url, "worker.stages": ["generate"], "jobs.split_encoding": True}
    installation = Installation(tmp_path / "data", {**given, "worker.maintenance": False})
    installation.folder.mkdir()
    code = (
        "import runpy\nfrom zcore.broker_transports import FolderTransport\n"
        f"FolderTransport._deliver = lambda *_: 1 / 0\nrunpy.run_module({WORKER!r}, run_name='__main__')"
    )
    log = installation.folder / "worker.log"
    running = process.start([sys.executable, "-c", code], log, environment=installation.environment, folder=TREE)
    try:
        assert running.process.wait(120) == BROKEN_STATUS, running.last_lines()
        assert "Celery has stopped by itself" in running.last_lines()
    finally:
        running.stop(signal.SIGKILL)


def test_a_full_disk_leaves_no_half_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Installation(tmp_path, {}).settings
    write_bytes = Path.write_bytes

    def write_half(path: Path, content: bytes) -> int:
        write_bytes(path, content[:10])
        raise OSError(28, "No space left on device")

    with make_app(settings).connection() as connection:
        channel = connection.default_channel
        assert isinstance(channel, FolderChannel)
        monkeypatch.setattr(Path, "write_bytes", write_half)
        with pytest.raises(OSError, match="No space left"):
            channel._put(QUEUE, WELL_FORMED)
        monkeypatch.undo()
        assert list((tmp_path / "broker" / "queue").iterdir()) == []
        channel._put(QUEUE, WELL_FORMED)
        assert channel._size(QUEUE) == 1


def discarded(worker: Running) -> int:
    """Return how many messages the worker has discarded."""
    worker.check()
    return sum(line["event"] == "broker.message_discarded" for line in events(worker))


def unread(installation: Installation) -> int:
    """Return how many notifications are still in the broker."""
    with make_app(installation.settings).connection() as connection:
        return int(connection.default_channel.queue_declare(QUEUE, durable=True, auto_delete=False).message_count)

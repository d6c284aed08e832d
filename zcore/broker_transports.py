"""How notifications travel: Redis, or a folder of this host; kombu's transports, made safe from what they deliver.

A message that is not a notification is logged and discarded, whatever it holds. kombu's own transports let the error of
such a message end the worker, and its folder contains empty files when the disk is full, or for a moment before each
message is complete.
"""

import contextlib
import os
import uuid
from datetime import datetime
from pathlib import Path
from queue import Empty
from time import time, time_ns
from typing import Any, Literal, cast

import msgspec
from kombu.transport import redis, virtual

from zcore.telemetry import log

DRAIN_TASK = "zimage.run_jobs"
FOLDER_TRANSPORT = "zcore.broker_transports:FolderTransport"
REDIS_TRANSPORT = "zcore.broker_transports:RedisTransport"
SENTINEL_TRANSPORT = "zcore.broker_transports:SentinelTransport"
NO_ARGUMENTS = "W1tdLHt9LHt9XQ=="
"""`[[],{},{}]` in base64: the arguments of a task, its keyword arguments and its callbacks."""
_DECODING_ERRORS = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)
"""What kombu's decoder raises, which has errors of its own for each type. A connection raises none of these."""


DRAFT_LIFETIME_S = 60.0
"""After this time no process still writes a draft: it was killed, or its disk failed."""


class _Headers(msgspec.Struct):
    id: str
    task: Literal["zimage.run_jobs"]
    expires: datetime | None = None


class _DeliveryInfo(msgspec.Struct):
    exchange: str
    routing_key: str


class _Properties(msgspec.Struct):
    delivery_tag: str
    delivery_info: _DeliveryInfo


class _Notification(msgspec.Struct):
    """The parts of a message of ours that Celery needs, under the names of its protocol 2."""

    headers: _Headers
    properties: _Properties


def notification(message: object) -> dict[str, Any] | None:
    """Return this message with nothing but what a notification has; None if it is none.

    Celery sees the result only, so its handling of fields that we do not use cannot fail.
    """
    try:
        found: dict[str, Any] = msgspec.to_builtins(msgspec.convert(message, _Notification))
    except (msgspec.ValidationError, RecursionError):
        return None
    found["properties"]["body_encoding"] = "base64"
    return {**found, "body": NO_ARGUMENTS, "content-type": "application/json", "content-encoding": "utf-8"}


class _Delivering(virtual.Transport):
    """Base of transports that deliver only notifications."""

    def _deliver(self, message: object, queue: str | None) -> None:
        found = notification(message)
        if found is None:
            log.warning("broker.message_discarded", queue=queue, reason="it is not a notification")
        else:
            super()._deliver(found, queue)


def remove_lost_drafts(folder: Path) -> None:
    """Remove the messages whose writer did not complete them."""
    for draft in folder.glob("*.draft"):
        with contextlib.suppress(OSError):  # another process was faster
            if time() - draft.stat().st_mtime > DRAFT_LIFETIME_S:
                draft.unlink()


class FolderChannel(virtual.Channel):
    """Messages as files in a folder: of several processes that find one, the one that can delete it has it."""

    def _put(self, queue: str, message: object, **_: Any) -> None:
        """Write a message, which appears in its folder completely or not at all."""
        path = self._folder / f"{time_ns()}-{uuid.uuid4()}.{queue}.msg"
        draft = path.with_suffix(".draft")
        try:
            draft.write_bytes(msgspec.json.encode(message))
            draft.replace(path)
        except OSError:
            draft.unlink(missing_ok=True)
            raise

    def _get(self, queue: str, timeout: float | None = None) -> object:
        """Return the oldest message. Raises `Empty`."""
        for path in self._messages(queue):
            try:
                content = path.read_bytes()
                path.unlink()
            except OSError:  # another process was faster, or it is no file
                continue
            try:
                return msgspec.json.decode(content)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                log.warning("broker.message_discarded", queue=queue, reason="it is not JSON")
        raise Empty

    def _size(self, queue: str) -> int:
        return len(self._messages(queue))

    def _purge(self, queue: str) -> int:
        messages = self._messages(queue)
        for path in messages:
            path.unlink(missing_ok=True)
        return len(messages)

    def _messages(self, queue: str) -> list[Path]:
        # Listed without a pattern, which would take the time of a stat for each file.
        names = (name for name in os.listdir(self._folder) if name.partition(".")[2] == f"{queue}.msg")
        return [self._folder / name for name in sorted(names)]

    @property
    def _folder(self) -> Path:
        client = cast(Any, self.connection).client
        return Path(client.transport_options["folder"])


class FolderTransport(_Delivering):
    """A folder that the processes of one host share. Queues need no declaration: their names are those of files."""

    Channel = FolderChannel
    driver_type = driver_name = "folder"
    default_port = 0

    def driver_version(self) -> str:
        return "N/A"


class _RedisChannel(redis.Channel):
    def _brpop_read(self, **options: Any) -> bool | None:
        """Read a message. One that cannot be decoded has left the queue, and is discarded."""
        try:
            return cast(Any, super())._brpop_read(**options)
        except _DECODING_ERRORS as fault:
            log.warning("broker.message_discarded", reason=f"it cannot be decoded: {type(fault).__name__}")
            return True


class _SentinelChannel(_RedisChannel, redis.SentinelChannel):
    pass


class RedisTransport(_Delivering, redis.Transport):
    """A Redis server."""

    Channel = _RedisChannel


class SentinelTransport(_Delivering, redis.SentinelTransport):
    """Redis servers that Redis Sentinel watches."""

    Channel = _SentinelChannel

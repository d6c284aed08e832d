"""Small S3 servers that behave as some stores do and neither AWS nor SeaweedFS does.

`StrictStore` refuses `aws-chunked` bodies (as Alibaba's OSS and Oracle's OCI do), wants Content-MD5 for bulk deletion,
and denies its keys everything but putting, getting and deleting objects. `IgnorantStore` does not know `aws-chunked`:
it stores what comes, ignores checksums, and returns ETags that are not an MD5; its pages list two keys at most. It also
damages objects as `damage` says. `UnsteadyStore` answers late, with 503 or not at all. All check the lifetime of a
presigned URL; none checks a signature, which SeaweedFS does.
"""

import base64
import hashlib
import ssl
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit
from uuid import uuid4

BUCKET = "images"


@dataclass(frozen=True)
class Stored:
    """An object and its media type."""

    content: bytes
    media_type: str


@dataclass(frozen=True)
class Received:
    """A request as it came over the wire; header names are lower case."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Answer:
    """A response. A problem is the S3 error code of a refusal."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    body: bytes = b""
    problem: str = ""


class OddStore(ABC):
    """One bucket that exists, and what the server received."""

    status_of_missing_delete = 204

    def __init__(self) -> None:
        self.objects: dict[str, Stored] = {}
        self.received: list[Received] = []

    def answer(self, request: Received) -> Answer:
        """Answer a request as S3 does, as far as this service uses it."""
        bucket, _, key = request.path.removeprefix("/").partition("/")
        if bucket != BUCKET:
            return (
                Answer(403, problem="AccessDenied") if request.method == "PUT" else Answer(404, problem="NoSuchBucket")
            )
        if not key:
            return self.answer_bucket(request)
        if "X-Amz-Date" in request.query and _has_expired(request.query):
            return Answer(403, problem="AccessDenied")
        if request.method == "PUT":
            return self.put(key, request)
        if request.method == "DELETE":
            return Answer(204 if self.objects.pop(key, None) else self.status_of_missing_delete)
        stored = self.objects.get(key)
        if stored is None:
            return Answer(404, problem="NoSuchKey")
        overridden = {name[9:]: value for name, value in request.query.items() if name.startswith("response-")}
        return Answer(200, {"content-type": stored.media_type, "etag": self.etag(stored), **overridden}, stored.content)

    @abstractmethod
    def answer_bucket(self, request: Received) -> Answer:
        """Answer a request about the bucket itself."""

    def put(self, key: str, request: Received) -> Answer:
        """Store an object."""
        stored = self.objects[key] = Stored(request.body, request.headers.get("content-type", ""))
        return Answer(200, {"etag": self.etag(stored)})

    def etag(self, stored: Stored) -> str:
        """Return an object's ETag, in quotes."""
        return f'"{hashlib.md5(stored.content).hexdigest()}"'


class StrictStore(OddStore):
    """A store that refuses what it does not know, and keys that may only do what the work requires."""

    def answer_bucket(self, request: Received) -> Answer:
        """Deny everything about the bucket, except a bulk deletion with Content-MD5."""
        if request.method == "POST" and "delete" in request.query:
            return Answer(501 if _has_md5(request) else 400, problem="MissingContentMD5")
        return Answer(403, problem="AccessDenied")

    def put(self, key: str, request: Received) -> Answer:
        """Store an object whose body is plain and whose MD5 is right."""
        if "aws-chunked" in request.headers.get("content-encoding", "") or "x-amz-trailer" in request.headers:
            return Answer(400, problem="NotImplemented")
        if "content-md5" in request.headers and not _has_md5(request):
            return Answer(400, problem="BadDigest")
        return super().put(key, request)


class IgnorantStore(OddStore):
    """A store that believes every body, and answers 404 when an object to be deleted is not there."""

    status_of_missing_delete = 404

    def __init__(self) -> None:
        super().__init__()
        self.damage: Callable[[bytes], bytes | None] = lambda content: content

    def put(self, key: str, request: Received) -> Answer:
        """Store what `damage` leaves of a body, or nothing."""
        damaged = self.damage(request.body)
        if damaged is None:
            return Answer(200, {"etag": '"0"'})
        return super().put(key, Received(request.method, request.path, request.query, request.headers, damaged))

    def etag(self, stored: Stored) -> str:
        """Return an ETag in the style of an object that was stored in parts."""
        return f'"{hashlib.md5(stored.content[:1]).hexdigest()}-1"'

    def answer_bucket(self, request: Received) -> Answer:
        """Deny bulk deletion, which this store does not have, and list two keys at a time."""
        return Answer(501, problem="NotImplemented") if request.method == "POST" else self._list(request.query)

    def _list(self, query: Mapping[str, str]) -> Answer:
        wanted = (query.get("prefix", ""), query.get("marker", ""))
        found = sorted(key for key in self.objects if key.startswith(wanted[0]) and key > wanted[1])
        keys, is_truncated = found[:2], len(found) > 2
        contents = "".join(
            f"<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key in keys
        )
        body = f"<IsTruncated>{str(is_truncated).lower()}</IsTruncated>{contents}"
        return Answer(body=f"<ListBucketResult>{body}</ListBucketResult>".encode())


class UnsteadyStore(StrictStore):
    """A store that takes `delay_s` for every object, and answers 503 or not at all when a test asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.delay_s = 0.0
        self.is_unavailable = False
        self.answers = threading.Event()
        self.answers.set()

    def answer(self, request: Received) -> Answer:
        """Answer as the attributes say."""
        self.answers.wait()
        if self.is_unavailable:
            return Answer(503, problem="SlowDown")
        time.sleep(self.delay_s)
        return super().answer(request)


@contextmanager
def serving(store: OddStore, context: ssl.SSLContext | None = None) -> Iterator[str]:
    """Serve the store on the loopback interface; yield its endpoint URL, whose host is `localhost`.

    It is served over https with a `context`, else over http.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            url = urlsplit(self.path)
            headers = {name.lower(): value for name, value in self.headers.items()}
            body = self.rfile.read(int(headers.get("content-length", 0)))
            query = dict(parse_qsl(url.query, keep_blank_values=True))
            request = Received(self.command, unquote(url.path), query, headers, body)
            store.received.append(request)
            answer = store.answer(request)
            content = _problem(answer.problem) if answer.problem else answer.body
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(content)))
            self.send_header("x-amz-request-id", uuid4().hex)
            self.end_headers()
            if self.command != "HEAD" and answer.status != 204:
                self.wfile.write(content)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        # The handshake takes place in the thread of a connection, not in the one that accepts them.
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"{'http' if context is None else 'https'}://localhost:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def _has_expired(query: Mapping[str, str]) -> bool:
    signed_at = datetime.strptime(query["X-Amz-Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    return datetime.now(UTC) > signed_at + timedelta(seconds=int(query["X-Amz-Expires"]))


def _has_md5(request: Received) -> bool:
    return request.headers.get("content-md5") == base64.b64encode(hashlib.md5(request.body).digest()).decode()


def _problem(code: str) -> bytes:
    return f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>no</Message></Error>'.encode()

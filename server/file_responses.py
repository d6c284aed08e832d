"""Responses that serve one file as RFC 9110 defines it: preconditions, ranges, resumed downloads, HEAD.

Litestar's `File` response always sends the whole file. Does not know where files come from or who may read them.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import formatdate, parsedate_to_datetime
from http import HTTPStatus
from typing import Any, BinaryIO, cast

from litestar.datastructures import Headers
from litestar.enums import ScopeType
from litestar.types import Receive, Scope, Send

from server.threads import ThreadPool

PIECE_BYTES = 262_144
MAX_DIGITS = 18
"""Digits of a range's position that are read; no file has that many bytes."""


@dataclass(frozen=True, slots=True)
class Version:
    """What identifies the content of a file: a strong ETag, and the time of the last change in whole Unix seconds."""

    etag: str
    modified_at_s: int


@dataclass(frozen=True, slots=True)
class Selection:
    """The status of a response, and the part of the file that it consists of: `length` bytes from `start`."""

    status: HTTPStatus
    start: int = 0
    length: int = 0


class FileResponse:
    """ASGI application that answers a GET or HEAD from an open file, which it closes.

    `server.edge` passes HEAD on as GET, and leaves the original in the scope as `requested_method`.
    """

    def __init__(self, file: BinaryIO, headers: Mapping[str, str], threads: ThreadPool) -> None:
        """`headers` describe the file, such as its media type; refusals do not have them. `threads` read the file."""
        self._file = file
        self._headers = headers
        self._threads = threads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request. Raises `OSError` if the file cannot be read to its end."""
        assert scope["type"] == ScopeType.HTTP
        with self._file as file:
            stat = os.fstat(file.fileno())
            version = Version(f'"{stat.st_ino:x}-{stat.st_mtime_ns:x}-{stat.st_size:x}"', int(stat.st_mtime))
            method = str(cast(dict[str, Any], scope).get("requested_method", scope["method"]))
            selected = select(method, Headers.from_scope(scope), version, stat.st_size)
            described: Mapping[str, str] = self._headers if selected.status < HTTPStatus.BAD_REQUEST else {}
            headers = {**described, **_headers(selected, version, stat.st_size)}
            raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
            await send({"type": "http.response.start", "status": int(selected.status), "headers": raw})
            remaining = 0 if method == "HEAD" else selected.length
            file.seek(selected.start)
            while remaining:
                piece = await self._threads.run(file.read, min(PIECE_BYTES, remaining))
                if not piece:
                    raise OSError("the file became shorter while it was sent")
                remaining -= len(piece)
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def select(method: str, headers: Headers, version: Version, size: int) -> Selection:
    """Return what to answer to a GET or HEAD with these headers for a file of `size` bytes.

    The order is that of RFC 9110, section 13.2.2. Invalid dates and ranges are ignored, and so are requests for several
    ranges at once, as the RFC permits.
    """
    if not _is_expected(headers, version):
        return Selection(HTTPStatus.PRECONDITION_FAILED)
    if _is_known(headers, version):
        return Selection(HTTPStatus.NOT_MODIFIED)
    wanted = headers.get("range")
    part = _part(wanted, size) if method == "GET" and wanted and _applies(headers.get("if-range"), version) else None
    return part or Selection(HTTPStatus.OK, 0, size)


def _is_expected(headers: Headers, version: Version) -> bool:
    """Return whether If-Match, or else If-Unmodified-Since, lets the request proceed."""
    if (condition := _joined(headers, "if-match")) is not None:
        return _matches(condition, version.etag, weakly=False)
    date = _seconds(headers.get("if-unmodified-since"))
    return date is None or version.modified_at_s <= date


def _is_known(headers: Headers, version: Version) -> bool:
    """Return whether If-None-Match, or else If-Modified-Since, says that the client has this version."""
    if (condition := _joined(headers, "if-none-match")) is not None:
        return _matches(condition, version.etag, weakly=True)
    date = _seconds(headers.get("if-modified-since"))
    return date is not None and version.modified_at_s <= date


def _headers(selected: Selection, version: Version, size: int) -> dict[str, str]:
    headers = {
        "accept-ranges": "bytes",
        "etag": version.etag,
        "last-modified": formatdate(version.modified_at_s, usegmt=True),
    }
    if selected.status != HTTPStatus.NOT_MODIFIED:
        headers["content-length"] = str(selected.length)
    if selected.status == HTTPStatus.PARTIAL_CONTENT:
        headers["content-range"] = f"bytes {selected.start}-{selected.start + selected.length - 1}/{size}"
    elif selected.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        headers["content-range"] = f"bytes */{size}"
    return headers


def _part(wanted: str, size: int) -> Selection | None:
    """Return the part that a Range header asks for, or None if the header has to be ignored (RFC 9110, 14.2)."""
    found = re.fullmatch(r"bytes=[ \t]*(\d*)-(\d*)[ \t]*", wanted.strip(), re.IGNORECASE | re.ASCII)
    if found is None or not any(found.groups()):
        return None
    first, last = found.groups()
    if not first:
        start, end = max(0, size - _position(last)), size
    else:
        start, end = _position(first), min(_position(last) + 1, size) if last else size
        if last and _position(last) < start:
            return None
    if start >= size:
        return Selection(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
    return Selection(HTTPStatus.PARTIAL_CONTENT, start, end - start)


def _applies(if_range: str | None, version: Version) -> bool:
    """Return whether the client's part is of this version (RFC 9110, 13.1.5): if not, it needs the whole file."""
    if if_range is None:
        return True
    if '"' in if_range:
        return if_range.strip() == version.etag
    # A file may change twice in one second, so a date identifies a version only once that second has passed.
    is_strong = datetime.now(UTC).timestamp() >= version.modified_at_s + 1
    return is_strong and _seconds(if_range) == version.modified_at_s


def _matches(condition: str, etag: str, *, weakly: bool) -> bool:
    if condition.strip() == "*":
        return True
    tags: list[tuple[str, str]] = re.findall(r'(W/)?("[^"]*")', condition)
    return any(tag == etag and (weakly or not weak) for weak, tag in tags)


def _joined(headers: Headers, name: str) -> str | None:
    lines = headers.getall(name, [])
    return ", ".join(lines) if lines else None


def _seconds(date: str | None) -> int | None:
    """Return the Unix time of an HTTP date in any of its three formats, or None if it is not one."""
    try:
        parsed = parsedate_to_datetime(date) if date else None
        return None if parsed is None else int(parsed.replace(tzinfo=parsed.tzinfo or UTC).timestamp())
    except (ValueError, OverflowError):
        return None


def _position(digits: str) -> int:
    return int(digits.lstrip("0")[: MAX_DIGITS + 1] or "0")

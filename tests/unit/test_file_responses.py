"""Files at the edge, where HEAD is GET to the application."""

import asyncio
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.drain import Drain
from server.edge import Edge
from server.file_responses import FileResponse
from server.threads import ThreadPool
from zcore.settings import ServerSettings

FILE_HEADERS = {"content-type": "image/png", "cache-control": "private, max-age=900"}


class CountedFile(FileIO):
    """A file that counts how often it is read."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        return super().read(-1 if size is None else size)


@pytest.fixture
def file(tmp_path: Path) -> CountedFile:
    (tmp_path / "image.png").write_bytes(b"0123456789")
    return CountedFile(tmp_path / "image.png")


def fetch(file: CountedFile, method: str, headers: Mapping[str, str]) -> httpx.Response:
    async def fetched() -> httpx.Response:
        file_response = FileResponse(file, FILE_HEADERS, ThreadPool("test", threads=1, max_waiting=1))
        app: Any = Edge(file_response, ServerSettings(), Drain(0, on_begin=lambda: None))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.request(method, "/", headers=headers)

    return asyncio.run(fetched())


def test_head_does_not_read_the_file(file: CountedFile) -> None:
    answer = fetch(file, "HEAD", {"range": "bytes=2-3"})
    assert (answer.status_code, answer.headers["content-length"], answer.content) == (200, "10", b"")
    assert answer.headers["content-type"] == "image/png"
    assert (file.reads, file.closed) == (0, True)


@pytest.mark.parametrize(
    ("headers", "status"), [({"range": "bytes=10-"}, 416), ({"if-match": '"another"'}, 412)], ids=["416", "412"]
)
def test_a_refusal_does_not_say_that_it_is_an_image_to_cache(
    file: CountedFile, headers: dict[str, str], status: int
) -> None:
    answer = fetch(file, "GET", headers)
    assert (answer.status_code, answer.content) == (status, b"")
    assert "content-type" not in answer.headers
    assert answer.headers["cache-control"] == "no-store"

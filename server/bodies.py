"""Reading of request bodies: spooled to disk while they arrive, and parsed in a worker thread.

A client that stalls holds a file and not memory, and a body that takes long to parse holds up no other request.
"""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from tempfile import SpooledTemporaryFile
from typing import Any, cast

import msgspec
from litestar import Request

from server.threads import ThreadPool, Threads
from zcore.errors import FieldError, InvalidRequest

IN_MEMORY_BYTES = 64 * 1024
"""How much of a body is held in memory until it is complete; the rest is in the system's temporary folder."""


class BodyRequest(Request[Any, Any, Any]):
    """A request whose body is spooled. Handlers that take `data` get the JSON object of the body."""

    _content: bytes | None = None

    @property
    def _local(self) -> ThreadPool:
        threads: Threads = self.app.state.threads
        return threads.local

    @asynccontextmanager
    async def spooled(self) -> AsyncGenerator[SpooledTemporaryFile[bytes]]:
        """Receive the complete body, and provide it as a file that is deleted at the end of the block."""
        with SpooledTemporaryFile[bytes](max_size=IN_MEMORY_BYTES) as file:
            size = 0
            async for chunk in self.stream():
                size += len(chunk)
                if size <= IN_MEMORY_BYTES:
                    file.write(chunk)
                else:
                    await self._local.run(file.write, chunk)
            file.seek(0)
            yield file

    async def body(self) -> bytes:
        """Return the complete body."""
        if self._content is None:
            async with self.spooled() as file:
                self._content = await self._local.run(file.read)
        return self._content

    async def json(self) -> Any:
        """Return the JSON object in the body. Raises `InvalidRequest` if it is anything else."""
        return await self._local.run(parse_object, await self.body())


def parse_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object in these bytes. Raises `InvalidRequest` if they are anything else."""
    try:
        found = msgspec.json.decode(body)
    except UnicodeDecodeError as error:
        raise _invalid("must be JSON in UTF-8") from error
    except RecursionError as error:
        raise _invalid("is nested too deeply") from error
    except msgspec.DecodeError as error:
        raise _invalid(f"must be JSON; {error}") from error
    if not isinstance(found, dict):
        raise _invalid("must be a JSON object")
    return cast(dict[str, Any], found)


def _invalid(detail: str) -> InvalidRequest:
    return InvalidRequest([FieldError("", f"the body {detail}")])

"""Threads for blocking work: one pool for each thing that it waits for, so that one that hangs stops nothing else.

asyncio's own default is one small pool for everything: while a bucket hung, it had no thread left for any other route.
"""

import asyncio
import contextvars
import math
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, ParamSpec, TypeVar

from zcore.errors import Overloaded

P = ParamSpec("P")
T = TypeVar("T")

LOCAL_THREADS = 4
FILE_THREADS = 8
STORAGE_THREADS = 16
MAX_WAITING = 500
MAX_WAITING_FOR_STORAGE = 32


class ThreadPool(ThreadPoolExecutor):
    """Threads that wait for the same thing, called `name`. Beyond `max_waiting` calls without one, it refuses calls."""

    def __init__(self, name: str, threads: int, max_waiting: float) -> None:
        super().__init__(threads, thread_name_prefix=name)
        self._name = name
        self._max_calls = threads + max_waiting
        self._calls = 0
        self._counting = threading.Lock()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run a call when a thread is free. Raises `Overloaded` if too many calls wait already."""
        with self._counting:
            if self._calls >= self._max_calls:
                raise Overloaded(f"too many requests wait for {self._name}; try again in a few seconds")
            future = super().submit(fn, *args, **kwargs)
            self._calls += 1
        future.add_done_callback(self._count_end)
        return future

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return the result of a blocking call. Raises `Overloaded` if too many calls wait already."""
        call = partial(contextvars.copy_context().run, partial(function, *args, **kwargs))
        return await asyncio.get_running_loop().run_in_executor(self, call)

    def _count_end(self, _: Future[Any]) -> None:
        with self._counting:
            self._calls -= 1


@dataclass(frozen=True, slots=True)
class Threads:
    """The pools of a server.

    `database` is also the default of the event loop, and so that of handlers with `sync_to_thread`. What runs in it may
    use the database and nothing else that can hang. `files` reads images that the server sends itself: it refuses
    nothing, because an answer that has begun cannot be refused. `local` is for computing and for temporary files.
    """

    database: ThreadPool
    storage: ThreadPool
    files: ThreadPool
    local: ThreadPool

    @classmethod
    def create(cls, database_connections: int) -> "Threads":
        """Create the pools; `database` has a thread for each of so many connections."""
        return cls(
            ThreadPool("the database", database_connections, MAX_WAITING),
            ThreadPool("storage", STORAGE_THREADS, MAX_WAITING_FOR_STORAGE),
            ThreadPool("files", FILE_THREADS, math.inf),
            ThreadPool("this server's processors", LOCAL_THREADS, MAX_WAITING),
        )

    def use_by_default(self) -> None:
        """Make `database` the default of the running event loop, which also shuts it down."""
        asyncio.get_running_loop().set_default_executor(self.database)

    def close(self) -> None:
        """Accept no more work, and do not wait for calls that may hang; at its exit the interpreter does."""
        for pool in (self.storage, self.files, self.local):
            pool.shutdown(wait=False, cancel_futures=True)

"""Pools of threads: what they refuse, and what their calls know of the request."""

import asyncio
import threading
from contextvars import ContextVar

import pytest

from server.threads import ThreadPool, Threads
from zcore.errors import Overloaded

REQUEST: ContextVar[str] = ContextVar("request")


def test_calls_beyond_the_bound_are_refused_and_accepted_again_afterwards() -> None:
    release = threading.Event()

    async def crowd() -> list[bool | BaseException]:
        pool = ThreadPool("storage", threads=1, max_waiting=1)
        calls = [asyncio.create_task(pool.run(release.wait, 30)) for _ in range(3)]
        [refused], waiting = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        with pytest.raises(Overloaded, match="too many requests wait for storage; try again"):
            refused.result()
        release.set()
        await asyncio.wait(waiting)
        return await asyncio.gather(*(pool.run(release.wait) for _ in range(2)), return_exceptions=True)

    assert asyncio.run(crowd()) == [True, True]


def test_an_answer_that_has_begun_is_never_refused_a_part_of_its_file() -> None:
    async def read() -> list[int]:
        pools = Threads.create(database_connections=1)
        return await asyncio.gather(*(pools.files.run(int, index) for index in range(2000)))

    assert asyncio.run(read()) == list(range(2000))


def test_a_call_has_the_context_of_its_request() -> None:
    async def ask() -> str:
        REQUEST.set("request-1")
        return await ThreadPool("test", threads=1, max_waiting=1).run(REQUEST.get)

    assert asyncio.run(ask()) == "request-1"

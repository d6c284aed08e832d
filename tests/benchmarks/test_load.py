"""At which rate of arrivals does the service break, what breaks first, and is it refused early or lost late?

Method: one real API process and one worker whose model sleeps; embedded (SQLite, folders) and on PostgreSQL, Redis and
SeaweedFS. Submissions arrive at a fixed rate whatever the answers do (open loop), on an idle connection or else a new
one, 6 s at each rate, and the rate doubles until fewer than 95 % are accepted or the p99 is above 1 s. A latency is
counted from the moment the submission was due, so a client that falls behind cannot hide it. The client shares the
machine. At the end every accepted job must be in the list of jobs.
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.acceptance.installation import distributed
from tests.benchmarks.report import report, spread
from tests.integration.installation import Installation
from tests.services.s3 import Bucket
from tests.waiting import wait_until

pytestmark = [pytest.mark.benchmarks, pytest.mark.timeout(1200)]

STEP_S = 6.0
FIRST_RATE = 10
LAST_RATE = 1280
ANSWER_TIMEOUT_S = 70.0
SLOW_MS = 1000.0
LONGEST_IDLE_S = 3.0  # uvicorn closes after 5
BODY = json.dumps({"prompt": "a red circle", "width": 64, "height": 64, "steps": 1}).encode()
REQUEST = (
    b"POST /api/generate HTTP/1.1\r\nhost: 127.0.0.1:%d\r\ncontent-type: application/json\r\n"
    b"content-length: " + str(len(BODY)).encode() + b"\r\n\r\n" + BODY
)


@dataclass(frozen=True)
class Outcome:
    """What became of one submission: a status, or the name of an error."""

    result: str
    took_ms: float


@dataclass
class Connection:
    """A connection to the API."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    idle_since: float = 0.0


class OpenLoop:
    """Sends submissions at a rate to one port."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._request = REQUEST % port
        self._idle: list[Connection] = []

    async def step(self, rate: int) -> list[Outcome]:
        """Send `rate` submissions a second for one step, and return what became of each."""
        began = time.perf_counter()
        tasks: list[asyncio.Task[Outcome]] = []
        for number in range(round(rate * STEP_S)):
            due_at = began + number / rate
            await asyncio.sleep(max(0.0, due_at - time.perf_counter()))
            tasks.append(asyncio.create_task(self._submit(due_at)))
        return await asyncio.gather(*tasks)

    def close(self) -> None:
        """Close the idle connections."""
        for connection in self._idle:
            connection.writer.close()

    async def _submit(self, due_at: float) -> Outcome:
        try:
            result = await asyncio.wait_for(self._exchange(), ANSWER_TIMEOUT_S)
        except (OSError, asyncio.IncompleteReadError, TimeoutError) as fault:
            result = type(fault).__name__
        return Outcome(result, (time.perf_counter() - due_at) * 1000)

    async def _exchange(self) -> str:
        connection = await self._connection()
        try:
            connection.writer.write(self._request)
            head = (await connection.reader.readuntil(b"\r\n\r\n")).lower()
            await connection.reader.readexactly(int(head.split(b"content-length:")[1].split(b"\r\n")[0]))
        except BaseException:
            connection.writer.close()
            raise
        if b"connection: close" in head:
            connection.writer.close()
        else:
            connection.idle_since = time.perf_counter()
            self._idle.append(connection)
        return head.split(b" ", 2)[1].decode()

    async def _connection(self) -> Connection:
        """Return an idle connection that the server has no reason to close yet, or else a new one."""
        while self._idle:
            connection = self._idle.pop()
            if time.perf_counter() - connection.idle_since < LONGEST_IDLE_S and not connection.reader.at_eof():
                return connection
            connection.writer.close()
        return Connection(*await asyncio.open_connection("127.0.0.1", self._port))


def test_load_embedded(tmp_path: Path, migrated_file: Path) -> None:
    (tmp_path / "zimage.db").write_bytes(migrated_file.read_bytes())
    ramp("embedded", Installation(tmp_path, {}))


def test_load_on_services(tmp_path: Path, database_url: str, redis_url: str, s3: Bucket) -> None:
    ramp("services", distributed(tmp_path, database_url, redis_url, s3, {}))


def ramp(name: str, installation: Installation) -> None:
    """Double the rate until the service breaks, and report every step."""
    with installation.serving() as server, installation.working(package="tests.chaos.stand_in_worker"):
        wait_until(lambda: httpx.get(f"{server.url}/health/ready").json()["workers"] > 0, timeout_s=120)
        steps = asyncio.run(_ramp(int(server.url.rpartition(":")[2])))
        accepted = sum(step["results"].get("202", 0) for step in steps)
        listed = _listed(server.url)
    report(f"arrivals per second that the service takes, open loop, {name}", steps=steps[1:], step_s=STEP_S)
    assert listed == accepted, "an accepted job is missing, or a refused one was stored"


async def _ramp(port: int) -> list[dict[str, Any]]:
    load, steps = OpenLoop(port), list[dict[str, Any]]()
    rate = FIRST_RATE
    warm_up = _summary(rate, await load.step(rate))
    steps.append(_summary(rate, await load.step(rate)))
    while not steps[-1]["broken"] and rate < LAST_RATE:
        rate *= 2
        steps.append(_summary(rate, await load.step(rate)))
    load.close()
    return [warm_up, *steps]


def _summary(rate: int, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    results = Counter(outcome.result for outcome in outcomes)
    accepted = [outcome.took_ms for outcome in outcomes if outcome.result == "202"]
    others = [outcome.took_ms for outcome in outcomes if outcome.result != "202"]
    broken = len(accepted) < 0.95 * len(outcomes) or spread(accepted)["p99"] > SLOW_MS
    return {
        "offered_per_s": rate,
        "results": dict(results),
        "accepted_ms": spread(accepted) if len(accepted) > 1 else None,
        "refused_ms": spread(others) if len(others) > 1 else None,
        "broken": broken,
    }


def _listed(url: str) -> int:
    count, path = 0, f"{url}/api/jobs?limit=200"
    while path:
        page = httpx.get(path, timeout=60).json()
        count, path = count + len(page["jobs"]), page["next"]
    return count

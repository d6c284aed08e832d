"""How many submissions per second does one API process accept on PostgreSQL, and how long does each take?

Method: one real server process, no worker; 16 keep-alive connections send POST /api/generate, each as soon as the last
one is answered, for 2 s of warm-up and 10 s of measurement; then one connection alone for 5 s. The limit is a plain
table filled over 16 connections with one commit per row, in the same run.
"""

import asyncio
import json
import threading
import time
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest

from tests.acceptance.installation import distributed
from tests.benchmarks.report import report, spread
from tests.integration.installation import Installation
from tests.services.s3 import Bucket

pytestmark = pytest.mark.benchmarks

CONNECTIONS = 16
BODY = json.dumps({"prompt": "a red circle on a white background", "width": 128, "height": 128}).encode()
REQUEST = (
    b"POST /api/generate HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    b"content-length: " + str(len(BODY)).encode() + b"\r\n\r\n" + BODY
)


@pytest.fixture
def installation(tmp_path: Path, database_url: str, redis_url: str, s3: Bucket) -> Installation:
    return distributed(tmp_path, database_url, redis_url, s3, {})


def test_submission_rate(installation: Installation, database_url: str) -> None:
    with installation.serving() as server:
        port = int(server.url.rpartition(":")[2])
        asyncio.run(_submit_for(port, CONNECTIONS, 2.0))
        many = asyncio.run(_submit_for(port, CONNECTIONS, 10.0))
        alone = asyncio.run(_submit_for(port, 1, 5.0))
    rows_per_s = _plain_rows_per_s(database_url, 5.0)
    report(
        "accepted submissions per second of one API process on PostgreSQL",
        connections=CONNECTIONS,
        per_s=round(len(many) / 10.0),
        ms=spread(many),
        alone_per_s=round(len(alone) / 5.0),
        alone_ms=spread(alone),
        plain_commits_per_s=round(rows_per_s),
        share_of_plain=round(len(many) / 10.0 / rows_per_s, 3),
    )


async def _submit_for(port: int, connections: int, duration_s: float) -> list[float]:
    """Return the milliseconds of every accepted submission."""
    until = time.perf_counter() + duration_s
    taken = await asyncio.gather(*(_submit_on_one(port, until) for _ in range(connections)))
    return [sample for samples in taken for sample in samples]


async def _submit_on_one(port: int, until: float) -> list[float]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    samples: list[float] = []
    while time.perf_counter() < until:
        began = time.perf_counter()
        writer.write(REQUEST)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 202"), head
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        samples.append((time.perf_counter() - began) * 1000)
    writer.close()
    await writer.wait_closed()
    return samples


def _plain_rows_per_s(database_url: str, duration_s: float) -> float:
    """Return the database's rate for the least that a submission must do: one durable row."""
    address = database_url.replace("postgresql+psycopg://", "postgresql://")
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute("CREATE TABLE plain (id uuid PRIMARY KEY, body jsonb)")
    counts = [0] * CONNECTIONS

    def fill(number: int) -> None:
        until = time.perf_counter() + duration_s
        with psycopg.connect(address, autocommit=True) as connection:
            while time.perf_counter() < until:
                connection.execute("INSERT INTO plain VALUES (%s, %s)", (uuid4(), BODY.decode()))
                counts[number] += 1

    threads = [threading.Thread(target=fill, args=(number,)) for number in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / duration_s

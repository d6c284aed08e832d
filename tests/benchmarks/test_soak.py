"""Do memory, descriptors, threads, tables, the bucket and Redis stay flat while the service works for long?

Method: two API processes, two workers whose model sleeps, and maintenance, on PostgreSQL, Redis and SeaweedFS; callers
submit, poll and cancel for SOAK_MINUTES (10), images expire after a minute, and webhooks are delivered. Everything is
measured every 10 s; reported are the second quarter and the last, as medians, and how many jobs ended between. The
rows of jobs stay by design: their tables are reported as bytes for each ended job, which should not grow.
"""

import asyncio
import os
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
from sqlalchemy import make_url

from tests.benchmarks.report import report
from tests.chaos.callers import Caller, Journal, Mix
from tests.chaos.network import looping
from tests.chaos.world import KEYS, Servers, World, fleet

pytestmark = [pytest.mark.benchmarks, pytest.mark.timeout(0)]

MINUTES = float(os.environ.get("SOAK_MINUTES", "10"))
CALLERS = 8
EVERY_S = 10.0
RETENTION_S = 60
TABLES = """
    SELECT relname, pg_total_relation_size(relid), n_dead_tup
    FROM pg_stat_user_tables ORDER BY relname
"""


def test_soak(tmp_path: Path) -> None:
    settings = {"jobs.retention_s": RETENTION_S, "jobs.input_retention_s": RETENTION_S}
    with looping() as loop, fleet(tmp_path, loop, seed=1, **settings) as world:
        assert world.pass_time(120, until=world.all_present), "the processes did not start"
        journal, stopped, mix = Journal(), asyncio.Event(), Mix(from_upload=0, from_output=0)
        callers = [
            Caller(world.url, KEYS["anna"], journal, random.Random(number), world.hooks.url, mix)
            for number in range(CALLERS)
        ]
        running = [loop.begin(caller.run(stopped, pause_s=0.3)) for caller in callers]
        measured = [measure(world)]
        until = time.monotonic() + MINUTES * 60
        while time.monotonic() < until:
            world.pass_time(EVERY_S)
            measured.append(measure(world))
        loop.call(stopped.set)
        world.pass_time(120, until=lambda: all(caller.done() for caller in running))
        assert not [slot.name for slot in world.slots if slot.ends], "a process ended"
    report("what grows while the service works", minutes=MINUTES, accepted=len(journal.accepted), **growth(measured))


def measure(world: World) -> dict[str, float]:
    """Return every measure by its name."""
    assert world.servers is not None
    found: dict[str, float] = {}
    for sample in world.samples[-len(world.slots) :]:
        found[f"{sample.process} MiB"] = round(sample.rss_bytes / 2**20, 1)
        found[f"{sample.process} descriptors"] = sample.descriptors
        found[f"{sample.process} threads"] = sample.threads
    return found | _of_database(world.servers) | _of_redis(world.servers) | _of_bucket(world.servers)


def growth(measured: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """Return the medians of the second and the last quarter of every measure."""
    quarter = max(1, len(measured) // 4)
    early, late = measured[quarter : 2 * quarter], measured[-quarter:]
    return {name: [_median(early, name), _median(late, name)] for name in measured[-1]}


def _median(measured: Sequence[dict[str, float]], name: str) -> float:
    return statistics.median([one[name] for one in measured if name in one] or [0.0])


def _of_database(servers: Servers) -> dict[str, float]:
    found: dict[str, float] = {}
    with psycopg.connect(servers.address) as connection:
        ended = connection.execute("SELECT count(*) FROM jobs WHERE completed_at IS NOT NULL").fetchone()
        connections = connection.execute("SELECT count(*) FROM pg_stat_activity WHERE datname IS NOT NULL").fetchone()
        assert ended is not None
        assert connections is not None
        found |= {"ended jobs": ended[0], "connections": connections[0]}
        for name, size, dead in connection.execute(TABLES):
            if name.startswith(("job", "webhook")):
                found[f"{name} bytes per ended job"] = round(size / max(1, ended[0]))
            else:
                found[f"{name} bytes"] = size
            found[f"{name} dead rows"] = dead
    return found


def _of_redis(servers: Servers) -> dict[str, float]:
    client: Any = redis.Redis(port=make_url(servers.redis.url).port or 0)  # its annotations are incomplete
    with client:
        used = client.info("memory")["used_memory"]
        return {"Redis keys": client.dbsize(), "Redis KiB": round(used / 1024)}


def _of_bucket(servers: Servers) -> dict[str, float]:
    with servers.bucket.client() as client:
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=servers.bucket.name)
        return {"objects": sum(len(page.get("Contents", [])) for page in pages)}

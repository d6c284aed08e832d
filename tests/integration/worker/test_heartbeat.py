"""A heartbeat that loses the database for a moment goes on as if nothing had happened."""

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.integration.worker.conftest import LEASE_S, Environment, open_storage
from tests.integration.worker.test_database_blips import ShakyDatabase
from worker import heartbeat as heartbeat_module
from worker.heartbeat import IDLE_READ_INTERVAL_S, UNRESPONSIVE_S, Heartbeat
from worker.phases import PhaseBudgets, StallWatch
from zcore.errors import ZImageError
from zcore.jobs import claims


@pytest.fixture
def environment(each_database_url: str, tmp_path: Path) -> Iterator[Environment]:
    """An environment whose database is shaky."""
    with closing(ShakyDatabase(each_database_url)) as database:
        yield Environment(database, open_storage(tmp_path))


class ManualTask:
    """A periodic task that runs when the test calls `run`."""

    def __init__(self, _name: str, run: Callable[[], None], _interval_s: float) -> None:
        self.run = run
        tasks.append(self)


tasks: list[ManualTask] = []


def test_a_lease_that_is_renewed_in_time_leaves_the_thread_its_time_to_react(
    environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has to stop later has the whole time again, although the lease once seemed to be lost."""
    now_s = 0.0
    monkeypatch.setattr(heartbeat_module, "PeriodicTask", ManualTask)
    monkeypatch.setattr(heartbeat_module, "time", SimpleNamespace(monotonic=lambda: now_s))
    database = environment.database
    assert isinstance(database, ShakyDatabase)
    job_id = environment.submit()
    with database.write() as transaction:
        job = claims.claim(transaction, "worker-1", LEASE_S)
    assert job is not None
    ended: list[ZImageError] = []
    watch = StallWatch(PhaseBudgets(3600, 3600, 5), 3600, lambda: now_s)
    Heartbeat(environment.context("worker-1", 0), job, watch, lambda _heartbeat, reason: ended.append(reason))
    run = tasks[-1].run

    database.is_away = True
    now_s = LEASE_S + 1
    run()  # the lease counts as lost
    database.is_away = False
    now_s += UNRESPONSIVE_S + 1
    run()  # it is renewed, because nobody has rescued the job
    environment.cancel(job_id)
    now_s += IDLE_READ_INTERVAL_S
    run()
    assert ended == [], "the thread has just learned that the job is canceled"
    now_s += UNRESPONSIVE_S
    run()
    assert [type(reason).__name__ for reason in ended] == ["GenerationCanceled"]

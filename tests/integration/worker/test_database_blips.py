"""A database that is away for a moment at the end of an attempt costs neither the work nor an attempt."""

import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import psycopg
import pytest
from sqlalchemy.exc import OperationalError

from tests.integration.worker.conftest import Environment, open_storage
from tests.waiting import wait_until
from zcore.jobs import lifecycle
from zcore.jobs.database import Database, Transaction
from zcore.request import GenerationRequest
from zcore.stages import Stage


class ShakyDatabase(Database):
    """A database whose `is_away` transactions fail to begin, and whose answer to a COMMIT is lost once when asked."""

    is_away = False
    loses_next_answer = False
    failures = 0

    @contextmanager
    def write(self) -> Generator[Transaction]:
        """Open a transaction."""
        self._fail_if(self.is_away)
        with super().write() as transaction:
            yield transaction
        loses, self.loses_next_answer = self.loses_next_answer, False
        self._fail_if(loses)

    def _fail_if(self, condition: bool) -> None:
        if condition:
            self.failures += 1
            raise OperationalError("COMMIT", {}, psycopg.OperationalError("the connection was cut"))


@pytest.fixture
def environment(each_database_url: str, tmp_path: Path) -> Iterator[Environment]:
    """An environment whose database is shaky."""
    storage = open_storage(tmp_path)
    storage.prepare()
    with closing(ShakyDatabase(each_database_url)) as database:
        yield Environment(database, storage)


def shaky(environment: Environment) -> ShakyDatabase:
    assert isinstance(environment.database, ShakyDatabase)
    return environment.database


def lose_answer_of(environment: Environment, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lose the answer to the COMMIT of the next call of `lifecycle.name`."""
    original = getattr(lifecycle, name)

    def losing(*arguments: object, **named: object) -> object:
        shaky(environment).loses_next_answer = shaky(environment).failures == 0
        return original(*arguments, **named)

    monkeypatch.setattr(lifecycle, name, losing)


def test_a_stored_image_waits_for_the_database_and_is_generated_once(environment: Environment) -> None:
    job_id = environment.submit()

    def cut(_key: str) -> None:
        shaky(environment).is_away = True

    environment.storage.after_put = cut
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(environment.generate_due)
        wait_until(lambda: shaky(environment).failures > 3)
        shaky(environment).is_away = False
        working.result()
    assert environment.events(job_id) == ["queued", "claimed", "succeeded"]
    assert environment.storage.keys() == [f"jobs/{job_id}/1-0.png"]
    assert len(environment.pipeline.requests) == 1


def test_a_lost_answer_to_the_commit_of_a_success_is_recognized(
    environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = environment.submit()
    lose_answer_of(environment, "complete", monkeypatch)
    environment.generate_due()
    assert shaky(environment).failures == 1
    assert environment.events(job_id) == ["queued", "claimed", "succeeded"]
    assert environment.storage.keys() == [f"jobs/{job_id}/1-0.png"], "the images of a succeeded job stay"
    assert environment.ended.is_set(), "webhook delivery is notified"


def test_a_lost_answer_to_the_commit_of_an_encoding_is_recognized(
    environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = environment.submit(stage=Stage.ENCODE)
    lose_answer_of(environment, "complete_encoding", monkeypatch)
    environment.encode_due()
    assert shaky(environment).failures == 1
    assert environment.events(job_id) == ["queued", "claimed", "encoded"]
    assert environment.storage.keys() == [f"jobs/{job_id}/embedding-1.safetensors"]
    assert environment.notifications.stages == [Stage.GENERATE]


@pytest.mark.parametrize(
    ("name", "event"), [("fail", "retry_scheduled"), ("release", "released"), ("acknowledge_cancel", "canceled")]
)
def test_an_unsuccessful_end_is_recorded_once(
    environment: Environment, monkeypatch: pytest.MonkeyPatch, name: str, event: str
) -> None:
    job_id = environment.submit(steps=50, n=8)
    worker, shutdown = environment.image_worker(grace_s=0, retry_delay_s=3600)

    def end(_request: GenerationRequest, step: int) -> None:
        if step > 0:
            threading.Event().wait(0.05)
        elif name == "fail":
            raise RuntimeError("something is wrong")
        elif name == "release":
            shutdown.begin()
        else:
            environment.cancel(job_id)

    environment.pipeline.before_step = end
    lose_answer_of(environment, name, monkeypatch)
    worker.drain()
    worker.finish()
    assert shaky(environment).failures == 1
    assert environment.events(job_id).count(event) == 1


def test_a_database_error_inside_an_attempt_is_not_charged(
    environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object) -> None:
        raise OperationalError("SELECT", {}, psycopg.OperationalError("the connection was cut"))

    earlier = environment.submit()
    environment.generate_due()
    job_id = environment.submit(max_attempts=1, image=f"output:{earlier}/0")
    monkeypatch.setattr("zcore.jobs.uploads.output_of_job", fail)
    environment.generate_due(retry_delay_s=3600)
    job = environment.job(job_id)
    assert (job.status, job.attempt, job.attempts_left) == ("queued", 1, 1)
    assert not environment.broken.is_set()

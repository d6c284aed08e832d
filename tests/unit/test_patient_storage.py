"""Reads and writes outlast an outage, a refused object is given up after a time, and a hanging request can be left."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait

import pytest

from tests.waiting import wait_until
from worker import breaker as breaker_module
from worker.breaker import Breaker
from worker.patient_storage import PatientStorage
from zcore.errors import GenerationCanceled, NotFound, StorageError
from zcore.storage_keys import PROBE_KEY


class ScriptedStorage:
    """Objects in memory; `before(key)` is called for every request and may raise or wait."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.before: Callable[[str], None] = lambda _key: None

    def prepare(self) -> None:
        """There is nothing to prepare."""

    def put(self, key: str, content: bytes, content_type: str) -> None:
        self._begin(key)
        self.objects[key] = content

    def get(self, key: str) -> bytes:
        self._begin(key)
        if key not in self.objects:
            raise NotFound(key)
        return self.objects[key]

    def link(self, key: str, name: str) -> object:
        """Not called: workers make no links."""
        raise AssertionError(key, name)

    def delete(self, keys: list[str]) -> None:
        for key in keys:
            self._begin(key)
            self.objects.pop(key, None)

    def _begin(self, key: str) -> None:
        self.requests.append(key)
        self.before(key)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker_module, "PROBE_BACKOFF_S", (0.01,))
    monkeypatch.setattr("worker.patient_storage.RETRY_BACKOFF_S", (0.0, 0.01))


@pytest.fixture
def store() -> ScriptedStorage:
    return ScriptedStorage()


@pytest.fixture
def returned() -> threading.Event:
    return threading.Event()


@pytest.fixture
def hanging() -> Iterator[threading.Event]:
    """What a hanging request waits for; set at the end of the test."""
    event = threading.Event()
    yield event
    event.set()


def patient(store: ScriptedStorage, returned: threading.Event, patience_s: float = 0.0) -> PatientStorage:
    return PatientStorage(store, patience_s, returned.set)


def go_on() -> None:
    """Let the job continue."""


def refuse(_key: str) -> None:
    raise StorageError("503")


@pytest.mark.parametrize("method", ["get", "put"])
def test_a_request_outlasts_an_outage_of_any_length(
    store: ScriptedStorage, returned: threading.Event, method: str
) -> None:
    store.objects["a"] = b"content"
    storage = patient(store, returned, patience_s=0.0)
    store.before = refuse
    with ThreadPoolExecutor(1) as pool:
        if method == "get":
            waiting = pool.submit(storage.get, "a", go_on)
        else:
            waiting = pool.submit(storage.put, "a", b"content", "text/plain", go_on)
        wait_until(lambda: store.requests.count(PROBE_KEY) > 5)
        assert storage.is_away
        store.before = lambda _key: None
        assert waiting.result(30) == (b"content" if method == "get" else None)
    assert returned.wait(30)
    assert not storage.is_away
    assert store.objects == {"a": b"content"}, "the probe is deleted"


def test_an_outage_that_another_request_found_is_an_outage_too(
    store: ScriptedStorage, returned: threading.Event
) -> None:
    storage = patient(store, returned, patience_s=0.0)
    store.before = refuse
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(storage.put, "a", b"", "text/plain", go_on)
        wait_until(lambda: storage.is_away)
        second = pool.submit(storage.put, "b", b"", "text/plain", go_on)
        wait_until(lambda: "b" in store.requests)
        store.before = lambda _key: None
        first.result(30)
        second.result(30)
    assert set(store.objects) == {"a", "b"}


def test_an_object_that_is_refused_while_others_are_taken_is_given_up(
    store: ScriptedStorage, returned: threading.Event
) -> None:
    def refuse_one(key: str) -> None:
        if key == "a":
            refuse(key)

    store.before = refuse_one
    storage = patient(store, returned, patience_s=0.05)
    with pytest.raises(StorageError):
        storage.put("a", b"", "text/plain", go_on)
    assert store.requests.count("a") > 1
    assert (storage.is_away, returned.is_set()) == (False, False)


def test_a_hanging_request_is_left_when_the_job_must_stop(
    store: ScriptedStorage, returned: threading.Event, hanging: threading.Event
) -> None:
    def cancel() -> None:
        raise GenerationCanceled("the caller canceled the job")

    store.before = lambda _key: hanging.wait(60) and None
    with pytest.raises(GenerationCanceled):
        patient(store, returned).get("a", cancel)


def test_a_wait_for_the_end_of_an_outage_is_left_when_the_job_must_stop(
    store: ScriptedStorage, returned: threading.Event
) -> None:
    storage = patient(store, returned)

    def cancel_during_outage() -> None:
        if storage.is_away:
            raise GenerationCanceled("the caller canceled the job")

    store.before = refuse
    with pytest.raises(GenerationCanceled):
        storage.get("a", cancel_during_outage)
    store.before = lambda _key: None


def test_a_store_that_accepts_and_never_answers_is_away(
    store: ScriptedStorage, returned: threading.Event, hanging: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(breaker_module, "PROBE_TIMEOUT_S", 0.05)

    def hang_or_refuse(key: str) -> None:
        if key == PROBE_KEY:
            hanging.wait(60)
        refuse(key)

    store.before = hang_or_refuse
    storage = patient(store, returned)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(storage.put, "a", b"", "text/plain", go_on)
        wait_until(lambda: storage.is_away)
        store.before = lambda _key: None
        hanging.set()  # the next probe begins when the one that hangs has ended
        waiting.result(30)
    assert "a" in store.objects


def test_one_probe_at_a_time_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker_module, "PROBE_TIMEOUT_S", 0.01)
    began, answers, waited = threading.Semaphore(0), threading.Event(), threading.Semaphore(0)

    def probe() -> None:
        began.release()
        answers.wait()

    def note_wait(futures: list[Future[None]], timeout_s: float) -> object:
        waited.release()
        return wait(futures, timeout_s)

    monkeypatch.setattr(breaker_module, "wait", note_wait)
    closed = threading.Event()
    breaker = Breaker("storage", probe, StorageError, closed.set)
    breaker.report_failure()
    for _ in range(5):
        assert waited.acquire(timeout=30)
    answers.set()
    assert closed.wait(30)
    assert began.acquire(blocking=False)
    assert not began.acquire(blocking=False), "five waits for one probe"


def test_a_breaker_whose_probe_has_a_defect_closes() -> None:
    """A breaker that stayed open would keep its worker from working for ever."""
    closed = threading.Event()

    def probe() -> None:
        raise ZeroDivisionError

    breaker = Breaker("storage", probe, StorageError, closed.set)
    caught: list[BaseException | None] = []
    hook, threading.excepthook = threading.excepthook, lambda thrown: caught.append(thrown.exc_value)
    try:
        breaker.report_failure()
        assert breaker.wait(30)
        wait_until(lambda: caught)
    finally:
        threading.excepthook = hook
    assert not breaker.is_open
    assert isinstance(caught[0], ZeroDivisionError)

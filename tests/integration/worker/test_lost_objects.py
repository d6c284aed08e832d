"""No object stays in storage without a row, and no row without its object, however a job, an upload or a LoRA ends."""

import os
import time
import uuid
from collections.abc import Iterable
from datetime import timedelta

import pytest
from structlog.testing import capture_logs

from tests.integration.worker.conftest import DAY_S, Environment
from worker.maintenance import sweep as sweep_module
from worker.maintenance.scheduler import Maintenance
from worker.shutdown import Shutdown
from zcore.errors import StorageError
from zcore.jobs import claims, leftovers, lifecycle, lora_library, queries, sweeps, uploads
from zcore.jobs.claims import Lease
from zcore.jobs.lifecycle import Failure
from zcore.jobs.lora_library import UploadedLora
from zcore.jobs.models import Leftover, Sweep
from zcore.jobs.uploads import UploadedImage
from zcore.stages import Stage
from zcore.storage_keys import embedding_key, new_lora_key, output_key


def claim(environment: Environment, lease_s: float = 60) -> Lease:
    with environment.database.write() as transaction:
        job = claims.claim(transaction, "worker-1", lease_s)
    assert job is not None
    return claims.lease_of(job)


def lose_attempt(environment: Environment, maintenance: Maintenance, job_id: uuid.UUID) -> None:
    """Let a worker store an image and die, and another process rescue the job."""
    claim(environment, lease_s=-1)
    environment.storage.put(output_key(job_id, environment.job(job_id).attempt, 0, "png"), b"image", "image/png")
    maintenance.run_once()
    assert environment.job(job_id).status == "queued"


def let_leftovers_be_due(environment: Environment) -> None:
    with environment.database.write() as transaction:
        transaction.session.query(Leftover).update({"due_at": transaction.now})


def let_sweeps_be_due(environment: Environment) -> None:
    with environment.database.write() as transaction:
        transaction.session.query(Sweep).update({"due_at": transaction.now - timedelta(seconds=1)})


def clean(environment: Environment, maintenance: Maintenance) -> None:
    let_leftovers_be_due(environment)
    maintenance.run_once()


def count_leftovers(environment: Environment) -> int:
    with environment.database.read() as transaction:
        return transaction.session.query(Leftover).count()


def put_old(environment: Environment, key: str, age_s: float = DAY_S + 60) -> None:
    """Store an object that is this old."""
    environment.storage.put(key, b"object", "image/png")
    stored_at = time.time() - age_s
    os.utime(environment.storage.root / key, (stored_at, stored_at))


def sweep_all(environment: Environment, maintenance: Maintenance) -> None:
    """Let every sweep go on until it has compared everything."""
    for _ in range(8):
        let_sweeps_be_due(environment)
        for _ in range(3):
            maintenance.run_once()


class Outage:
    """A storage whose deletions fail while it lasts, all or those of some keys."""

    def __init__(self, environment: Environment, monkeypatch: pytest.MonkeyPatch, part: str = "") -> None:
        self._delete = environment.storage.delete
        self._part = part
        self.is_over = False
        monkeypatch.setattr(environment.storage, "delete", self._refuse)

    def _refuse(self, keys: Iterable[str]) -> None:
        wanted = list(keys)
        if not self.is_over and any(self._part in key for key in wanted):
            raise StorageError("the storage is down")
        self._delete(wanted)


def test_a_job_canceled_while_it_waits_for_its_second_attempt(
    environment: Environment, maintenance: Maintenance
) -> None:
    job_id = environment.submit()
    lose_attempt(environment, maintenance, job_id)
    environment.cancel(job_id)
    clean(environment, maintenance)
    assert (environment.storage.keys(), count_leftovers(environment)) == ([], 0)


def test_a_job_canceled_during_its_second_attempt(environment: Environment, maintenance: Maintenance) -> None:
    job_id = environment.submit()
    lose_attempt(environment, maintenance, job_id)
    lease = claim(environment)
    environment.cancel(job_id)
    with environment.database.write() as transaction:
        assert lifecycle.acknowledge_cancel(transaction, lease) is not None
    clean(environment, maintenance)
    assert (environment.storage.keys(), count_leftovers(environment)) == ([], 0)


def test_a_job_that_fails_in_its_second_attempt(environment: Environment, maintenance: Maintenance) -> None:
    job_id = environment.submit()
    lose_attempt(environment, maintenance, job_id)
    with environment.database.write() as transaction:
        lifecycle.fail(transaction, claim_in(transaction), Failure("invalid_lora", "no", retryable=False), 0)
    clean(environment, maintenance)
    assert (environment.storage.keys(), count_leftovers(environment)) == ([], 0)


def claim_in(transaction: object) -> Lease:
    job = claims.claim(transaction, "worker-1", 60)
    assert job is not None
    return claims.lease_of(job)


def test_a_job_that_succeeds_in_its_second_attempt_during_an_outage_of_deletions(
    environment: Environment, maintenance: Maintenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = environment.submit()
    lose_attempt(environment, maintenance, job_id)
    outage = Outage(environment, monkeypatch)
    environment.generate_due()
    assert environment.job(job_id).status == "succeeded"
    clean(environment, maintenance)
    retained = output_key(job_id, 2, 0, "png")
    assert (len(environment.storage.keys()), count_leftovers(environment)) == (2, 1)
    outage.is_over = True
    maintenance.run_once()
    assert count_leftovers(environment) == 1, "it is tried again later, not at once"
    clean(environment, maintenance)
    assert (environment.storage.keys(), count_leftovers(environment)) == ([retained], 0)


def test_a_job_that_fails_by_rescue_while_deletions_fail(
    environment: Environment, maintenance: Maintenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = environment.submit(max_attempts=1)
    outage = Outage(environment, monkeypatch)
    lose_attempt(environment, maintenance, job_id)
    claim(environment, lease_s=-1)
    environment.storage.put(output_key(job_id, 2, 0, "png"), b"image", "image/png")
    maintenance.run_once()
    assert environment.job(job_id).status == "failed"
    clean(environment, maintenance)
    assert len(environment.storage.keys()) == 2
    outage.is_over = True
    clean(environment, maintenance)
    assert (environment.storage.keys(), count_leftovers(environment)) == ([], 0)


@pytest.mark.parametrize("crash", ["before the objects", "before the row"])
def test_a_process_that_is_killed_while_it_deletes(
    environment: Environment, maintenance: Maintenance, monkeypatch: pytest.MonkeyPatch, crash: str
) -> None:
    job_id = environment.submit()
    lose_attempt(environment, maintenance, job_id)
    environment.cancel(job_id)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    let_leftovers_be_due(environment)
    with monkeypatch.context() as patched:
        patched.setattr(
            *((environment.storage, "delete") if crash == "before the objects" else (leftovers, "forget")), die
        )
        with pytest.raises(KeyboardInterrupt):
            maintenance.run_once()
    assert count_leftovers(environment) == 1
    maintenance.leadership.resign()
    clean(environment, environment.maintenance(Shutdown(0)))
    assert (environment.storage.keys(), count_leftovers(environment)) == ([], 0)


def test_one_object_that_cannot_be_deleted_does_not_keep_the_others(
    environment: Environment, maintenance: Maintenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [environment.submit() for _ in range(5)]
    for job_id in jobs:
        environment.storage.put(output_key(job_id, 1, 0, "png"), b"image", "image/png")
        lease = claim(environment)
        environment.cancel(job_id)
        with environment.database.write() as transaction:
            lifecycle.acknowledge_cancel(transaction, lease)
    Outage(environment, monkeypatch, part=str(jobs[0]))
    clean(environment, maintenance)
    assert environment.storage.keys() == [output_key(jobs[0], 1, 0, "png")]
    assert count_leftovers(environment) == 1


def test_the_embedding_of_a_job_that_is_canceled_before_it_is_generated(
    environment: Environment, maintenance: Maintenance
) -> None:
    job_id = environment.submit(stage=Stage.ENCODE)
    environment.encode_due()
    assert environment.storage.keys() == [embedding_key(job_id, 1)]
    environment.cancel(job_id)
    clean(environment, maintenance)
    assert (environment.storage.keys(), count_leftovers(environment)) == ([], 0)


def test_what_a_lost_worker_stores_after_everything_is_found_by_the_sweep(
    environment: Environment, maintenance: Maintenance
) -> None:
    job_id = environment.submit()
    lose_attempt(environment, maintenance, job_id)
    environment.generate_due()
    clean(environment, maintenance)
    put_old(environment, output_key(job_id, 1, 0, "png"))
    put_old(environment, embedding_key(job_id, 1))
    sweep_all(environment, maintenance)
    assert environment.storage.keys() == [output_key(job_id, 2, 0, "png")]


def test_the_sweep_deletes_old_objects_without_a_row_and_no_others(
    environment: Environment, maintenance: Maintenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_module, "KEYS_PER_PAGE", 2)
    database, storage = environment.database, environment.storage
    succeeded, expired = environment.submit(), environment.submit()
    environment.generate_due()
    with database.write() as transaction:
        queries.get(transaction, expired).expires_at = transaction.now
    maintenance.run_once()
    ended, running = environment.submit(), environment.submit()
    environment.cancel(ended)
    claim(environment)
    image = UploadedImage("a" * 64, "png", 8, 8, 3)
    with database.write() as transaction:
        upload = uploads.record(transaction, "anna", image)
        uploads.mark_stored(transaction, upload, DAY_S)
        lora = lora_library.register(
            transaction, UploadedLora("dawn", "a" * 64, "MIT", 3), new_lora_key("dawn", "a" * 64)
        )
    retained = [
        output_key(succeeded, 1, 0, "png"),
        output_key(running, 1, 0, "png"),
        upload.storage_key,
        lora.storage_key,
        # Not keys of this service: the bucket may be shared.
        "jobs/report.png",
        f"jobs/{ended}/notes.txt",
        f"jobs/{ended}/1-2.png/more",
        "inputs/of-another-program",
        "loras/readme.md",
        "backup/2026.tar",
    ]
    lost = [
        output_key(expired, 1, 0, "png"),
        output_key(ended, 1, 0, "png"),
        output_key(uuid.uuid4(), 3, 1, "avif"),
        embedding_key(ended, 1),
        f"inputs/{'b' * 64}/{'a' * 64}",
        f"inputs/{'b' * 64}/{'a' * 64}-{'0' * 16}",
        new_lora_key("dawn", "a" * 64),
        f"jobs/{ended}/.1-1.png.{'0' * 16}",
    ]
    for key in (*retained, *lost):
        put_old(environment, key)
    young = output_key(ended, 1, 1, "png")
    put_old(environment, young, age_s=DAY_S - 60)
    with capture_logs() as logs:
        sweep_all(environment, maintenance)
    assert storage.keys() == sorted([*retained, young])
    assert sum(entry["count"] for entry in logs if entry["event"] == "sweep.deleted") == len(lost)
    assert [entry for entry in logs if entry["event"] == "sweep.object_missing"] == []


def test_rows_whose_object_is_missing_are_reported(environment: Environment, maintenance: Maintenance) -> None:
    jobs = [environment.submit() for _ in range(2)]
    environment.generate_due()
    with environment.database.write() as transaction:
        upload = uploads.record(transaction, "anna", UploadedImage("a" * 64, "png", 8, 8, 3))
        uploads.mark_stored(transaction, upload, DAY_S)
        uploads.record(transaction, "ben", UploadedImage("a" * 64, "png", 8, 8, 3))  # not stored yet
    environment.storage.delete([output_key(jobs[0], 1, 0, "png")])
    with capture_logs() as logs:
        sweep_all(environment, maintenance)
    missing = {entry["key"] for entry in logs if entry["event"] == "sweep.object_missing"}
    assert missing == {output_key(jobs[0], 1, 0, "png"), upload.storage_key}
    assert environment.job(jobs[0]).status == "succeeded", "it is only reported"


def test_a_bucket_that_may_not_be_listed_is_not_swept(
    environment: Environment, maintenance: Maintenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment.storage, "list_objects", lambda *_: None)
    lost = output_key(uuid.uuid4(), 1, 0, "png")
    put_old(environment, lost)
    with capture_logs() as logs:
        sweep_all(environment, maintenance)
    assert [entry["event"] for entry in logs if entry["event"].startswith("sweep")] == ["sweep.not_permitted"]
    assert environment.storage.keys() == [lost]


def test_a_bucket_that_may_be_listed_again_is_swept(
    environment: Environment, maintenance: Maintenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_old(environment, output_key(uuid.uuid4(), 1, 0, "png"))
    with monkeypatch.context() as patched:
        patched.setattr(environment.storage, "list_objects", lambda *_: None)
        let_sweeps_be_due(environment)
        maintenance.run_once()
        with environment.database.read() as transaction:
            assert transaction.session.query(Sweep).filter(sweeps.is_due(transaction)).count() == 2, "it is tried later"
    sweep_all(environment, maintenance)
    assert environment.storage.keys() == []


def test_a_page_that_storage_cuts_short_does_not_end_the_round(
    environment: Environment, maintenance: Maintenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [output_key(uuid.UUID(int=number), 1, 0, "png") for number in range(5)]
    for key in keys:
        put_old(environment, key)
    with environment.database.write() as transaction:
        transaction.session.query(Sweep).filter(Sweep.prefix != "jobs/").delete()
    list_objects = environment.storage.list_objects
    monkeypatch.setattr(
        environment.storage, "list_objects", lambda prefix, after, _limit: list_objects(prefix, after, 2)
    )
    let_sweeps_be_due(environment)
    maintenance.run_once()
    with environment.database.read() as transaction:
        assert transaction.session.query(Sweep).one().after == keys[1]


def test_the_sweep_goes_on_where_the_last_leader_stopped(
    environment: Environment, maintenance: Maintenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_module, "KEYS_PER_PAGE", 2)
    keys = sorted(f"jobs/{number}" for number in range(4))
    for key in keys:
        put_old(environment, key)
    with environment.database.write() as transaction:
        transaction.session.query(Sweep).filter(Sweep.prefix != "jobs/").delete()
    let_sweeps_be_due(environment)
    maintenance.run_once()
    maintenance.leadership.resign()
    let_sweeps_be_due(environment)
    with environment.database.read() as transaction:
        assert transaction.session.query(Sweep).one().after == keys[1]
    environment.maintenance(Shutdown(0)).run_once()
    with environment.database.read() as transaction:
        assert transaction.session.query(Sweep).one().after == keys[3]

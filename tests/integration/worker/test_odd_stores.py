"""A job's objects through their whole life in S3 stores that differ from AWS, and in a store that damages them."""

import ssl
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest

from tests.integration.worker.conftest import Environment
from tests.integration.worker.test_inputs import image_file, uploaded
from tests.integration.worker.test_maintenance import let_uploads_expire
from tests.services.odd_stores import BUCKET, IgnorantStore, OddStore, StrictStore, serving
from tests.services.tls import Authority
from worker.shutdown import Shutdown
from zcore.jobs import queries
from zcore.jobs.database import Database
from zcore.jobs.resource import describe
from zcore.settings import StorageSettings
from zcore.stages import Stage
from zcore.storage import BucketStorage

LORA_KEY = "loras/dawn/0a.safetensors"


@pytest.fixture
def authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Authority:
    """The authority that signs the stores' certificates."""
    authority = Authority(tmp_path, "stores")
    monkeypatch.setenv("AWS_CA_BUNDLE", str(authority.certificate))
    return authority


@contextmanager
def working_with(store: OddStore, authority: Authority, database_url: str) -> Iterator[Environment]:
    with (
        serving(store, authority.server_context("localhost")) as endpoint_url,
        closing(Database(database_url)) as database,
    ):
        settings = StorageSettings(
            bucket=BUCKET, endpoint_url=endpoint_url, access_key_id="key", secret_access_key="a/b+c=d"
        )
        storage = BucketStorage(settings)
        storage.prepare()
        yield Environment(database, storage)


@pytest.mark.parametrize("kind", [StrictStore, IgnorantStore])
def test_a_job_stores_reads_links_and_deletes_its_objects(
    kind: type[OddStore], authority: Authority, sqlite_url: str
) -> None:
    store = kind()
    with working_with(store, authority, sqlite_url) as environment:
        image = uploaded(environment, image_file())
        environment.storage.put(LORA_KEY, b"a LoRA", "application/octet-stream")
        job_id = environment.submit(stage=Stage.ENCODE, image=image, n=2)
        environment.encode_due()
        environment.generate_due()
        job = environment.job(job_id)
        assert job.status == "succeeded"
        assert len(store.objects) == 5, "an upload, a LoRA, an embedding, two images"
        sent = [request for request in store.received if request.method == "PUT"]
        assert not any({"content-encoding", "x-amz-trailer"} & set(request.headers) for request in sent)
        trusting = ssl.create_default_context(cafile=authority.certificate)
        for output in describe(job, "https://images.example", environment.storage.link).outputs:
            assert output.url is not None
            assert output.download_url is not None
            assert httpx.get(output.url, verify=trusting).content == environment.storage.get(
                job.outputs[output.index].key
            )
            saved = httpx.get(output.download_url, verify=trusting)
            assert saved.headers["content-disposition"] == f'attachment; filename="{job_id}-{output.index}.png"'
        let_uploads_expire(environment)
        with environment.database.write() as transaction:
            queries.get(transaction, job_id).expires_at = transaction.now
        environment.maintenance(Shutdown(0)).run_once()
        environment.delete_leftovers()
        assert environment.job(job_id).status == "expired"
        assert set(store.objects) == {LORA_KEY}


def test_a_job_whose_images_the_store_damages_does_not_succeed(authority: Authority, sqlite_url: str) -> None:
    store = IgnorantStore()
    store.damage = lambda content: content[: len(content) // 2] if content.startswith(b"\x89PNG") else content
    with working_with(store, authority, sqlite_url) as environment:
        job_id = environment.submit(max_attempts=1)
        environment.generate_due(upload_retry_s=0, retry_delay_s=3600)
        with environment.database.read() as transaction:
            end = queries.timeline(transaction, job_id).events[-1]
        assert (environment.job(job_id).status, end.detail["code"]) == ("queued", "storage_unavailable")
        assert "the store corrupted the object" in end.detail["message"]
        assert store.objects == {}


def test_a_job_survives_a_store_that_damages_once(authority: Authority, sqlite_url: str) -> None:
    store = IgnorantStore()

    def damage_once(content: bytes) -> bytes:
        store.damage = lambda intact: intact
        return content[:10]

    store.damage = damage_once
    with working_with(store, authority, sqlite_url) as environment:
        job_id = environment.submit()
        environment.generate_due()
        job = environment.job(job_id)
        assert (job.status, job.attempt) == ("succeeded", 1)
        assert len(environment.storage.get(job.outputs[0].key)) == job.outputs[0].bytes

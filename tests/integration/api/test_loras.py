"""The LoRA library: who may change it, which files it accepts, and how submissions use it."""

import hashlib
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
import torch
from safetensors.torch import load, save

from tests.integration.api.conftest import Api, pointers, problem
from worker.context import WorkerContext
from worker.image_worker import ImageWorker
from worker.inputs.fetch import InputSource
from worker.inputs.lora_cache import LoraCache
from worker.inputs.lora_sources import RegisteredLoras
from worker.load_model import load_pipeline, read_embedding
from worker.maintenance import tasks
from worker.patient_storage import PatientStorage
from worker.shutdown import Shutdown
from zcore.image_files.writing import Marks
from zcore.jobs import claims, lora_library
from zcore.jobs.models import LeftoverObject, Lora, WebhookEvent
from zcore.keys import load_keys
from zcore.storage import open_storage

TREE = Path(__file__).resolve().parents[3]
NIGHT = (TREE / "zcore" / "demo" / "loras" / "demo-night.safetensors").read_bytes()
OUTLINE = (TREE / "zcore" / "demo" / "loras" / "demo-outline.safetensors").read_bytes()
OCTETS = {"content-type": "application/octet-stream"}


@pytest.fixture(autouse=True)
def empty_library(open_api: Api) -> Iterator[None]:
    """Empty the library after each test."""
    yield
    shutil.rmtree(open_api.installation.folder / "storage" / "loras", ignore_errors=True)
    with open_api.database.write() as transaction:
        transaction.session.query(Lora).delete()


def admin(api: Api) -> dict[str, str]:
    return {"authorization": f"Bearer {(api.installation.folder / 'keys' / 'admin').read_text().strip()}"}


def register(
    api: Api, name: str, content: bytes = NIGHT, licence: str = "Apache-2.0", strict: str | None = None, **headers: str
) -> httpx.Response:
    given = headers or admin(api)
    query = {"name": name, "licence": licence} | ({} if strict is None else {"strict": strict})
    return api.post("/api/loras", params=query, content=content, headers=OCTETS | given)


def remove(api: Api, name: str, headers: dict[str, str] | None = None) -> httpx.Response:
    return api.client.delete(f"{api.url}/api/loras/{name}", headers=admin(api) if headers is None else headers)


def listed_names(api: Api) -> list[str]:
    return [lora["name"] for lora in api.get("/api/loras").json()["loras"]]


def stored_path(api: Api, name: str) -> Path:
    """Return the file of a registered LoRA."""
    with api.database.read() as transaction:
        found = lora_library.find(transaction, name)
    assert found is not None
    return api.installation.folder / "storage" / found.storage_key


def stored_files(api: Api) -> list[Path]:
    """Return the files of LoRAs after maintenance has deleted those without a row."""
    settings = api.installation.settings
    tasks.delete_leftovers(api.database, open_storage(settings, load_keys(settings).link), lambda: True)
    return [path for path in (api.installation.folder / "storage" / "loras").rglob("*") if path.is_file()]


def test_a_registered_lora_is_listed_and_can_be_used(open_api: Api) -> None:
    answer = register(open_api, "night", licence="CC BY 4.0")
    assert answer.status_code == 201, answer.text
    (shown,) = open_api.get("/api/loras").json()["loras"]
    assert shown == answer.json()
    assert shown | {"created_at": ""} == {
        "name": "night",
        "sha256": hashlib.sha256(NIGHT).hexdigest(),
        "licence": "CC BY 4.0",
        "bytes": len(NIGHT),
        "created_at": "",
        "strict": True,
    }
    assert stored_path(open_api, "night").read_bytes() == NIGHT
    submitted = open_api.submit(loras=[{"name": "night", "scale": 0.5}])
    assert submitted.status_code == 202
    assert submitted.json()["request"]["loras"] == [{"name": "night", "scale": 0.5}]


def test_only_the_admin_key_can_change_the_library(open_api: Api) -> None:
    problem(register(open_api, "night", authorization="Bearer anna-key-0123456789"), 401, "unauthorized")
    problem(register(open_api, "night", accept="*/*"), 401, "unauthorized")
    register(open_api, "night")
    problem(remove(open_api, "night", {}), 401, "unauthorized")
    assert listed_names(open_api) == ["night"]


def test_registering_the_same_file_again_succeeds_and_a_different_file_conflicts(open_api: Api) -> None:
    first = register(open_api, "night")
    assert register(open_api, "night").json() == first.json()
    problem(register(open_api, "night", OUTLINE), 409, "conflict")
    assert stored_path(open_api, "night").is_file()


def test_strict_is_listed_and_changes_only_by_registering_anew(open_api: Api) -> None:
    answer = register(open_api, "night", strict="false")
    assert (answer.status_code, answer.json()["strict"]) == (201, False)
    assert open_api.get("/api/loras").json()["loras"] == [answer.json()]
    assert register(open_api, "night", strict="false").json() == answer.json()
    refused = problem(register(open_api, "night"), 409, "conflict")
    assert "already registered with a different file, licence or `strict`" in refused["detail"]
    assert remove(open_api, "night").status_code == 204
    assert register(open_api, "night", strict="true").json()["strict"] is True


def test_a_strict_that_is_neither_true_nor_false_is_refused(open_api: Api) -> None:
    refused = problem(register(open_api, "night", strict="maybe"), 400, "invalid_request")
    (error,) = refused["errors"]
    assert (error["in"], error["name"]) == ("query", "strict")
    assert listed_names(open_api) == []


def test_a_file_whose_name_is_taken_is_not_stored(open_api: Api) -> None:
    register(open_api, "night")
    before = sorted((open_api.installation.folder / "storage" / "loras").rglob("*"))
    problem(register(open_api, "night", OUTLINE), 409, "conflict")
    assert sorted((open_api.installation.folder / "storage" / "loras").rglob("*")) == before


def test_concurrent_registrations_of_one_name_have_one_winner_whose_file_is_stored(open_api: Api) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(partial(register, open_api, "noon"), [NIGHT, OUTLINE] * 8))
    assert {answer.status_code for answer in answers} == {201, 409}
    (sha256,) = {answer.json()["sha256"] for answer in answers if answer.status_code == 201}
    assert stored_files(open_api) == [stored_path(open_api, "noon")]
    assert hashlib.sha256(stored_path(open_api, "noon").read_bytes()).hexdigest() == sha256


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("../night", NIGHT, {"in": "query", "name": "name"}),
        (" night", NIGHT, {"in": "query", "name": "name"}),
        ("night\n", NIGHT, {"in": "query", "name": "name"}),
        ("night", NIGHT[:-1], {"in": "body", "pointer": ""}),
        ("night", b"", {"in": "body", "pointer": ""}),
        ("night", b"\x80\x04K\x01.", {"in": "body", "pointer": ""}),
        ("night", b"PK\x03\x04" + bytes(40), {"in": "body", "pointer": ""}),
        ("night", b"\x02" + bytes(7) + b"{}", {"in": "body", "pointer": ""}),
    ],
)
def test_an_invalid_name_or_safetensors_file_is_refused(
    open_api: Api, name: str, content: bytes, place: dict[str, str]
) -> None:
    refused: dict[str, Any] = problem(register(open_api, name, content), 400, "invalid_request")
    assert [{**error, "detail": None} for error in refused["errors"]] == [{**place, "detail": None}]
    assert listed_names(open_api) == []


def test_removing_a_lora_deletes_only_its_own_file(open_api: Api) -> None:
    register(open_api, "night")
    register(open_api, "dusk")
    assert remove(open_api, "night").status_code == 204
    assert stored_files(open_api) == [stored_path(open_api, "dusk")]
    assert remove(open_api, "dusk").status_code == 204
    assert stored_files(open_api) == []
    problem(remove(open_api, "dusk"), 404, "not_found")


def test_a_lora_is_removed_although_its_file_cannot_be_deleted(open_api: Api) -> None:
    register(open_api, "night")
    path = stored_path(open_api, "night")
    path.unlink()
    (path / "obstacle").mkdir(parents=True)  # a folder cannot be deleted as a file
    assert remove(open_api, "night").status_code == 204
    assert listed_names(open_api) == []
    assert stored_files(open_api) == []
    with open_api.database.write() as transaction:
        assert transaction.session.query(LeftoverObject).one().tries == 1, "it is tried again"
        transaction.session.query(LeftoverObject).delete()
    assert register(open_api, "night").status_code == 201
    assert stored_path(open_api, "night").read_bytes() == NIGHT, "a new file has a new key"


def test_an_unknown_lora_is_refused_with_similar_names(open_api: Api) -> None:
    register(open_api, "night")
    refused = problem(open_api.submit(loras=[{"name": "night"}, {"name": "nigth"}]), 400, "invalid_request")
    assert pointers(refused) == {"/loras/1/name"}
    assert "did you mean `night`?" in refused["detail"]


def test_a_lora_whose_values_overflow_fails_its_job_without_an_image(open_api: Api) -> None:
    """Each value in the file is finite, so the library accepts it; only the computation overflows."""
    factors = {"lora_A": (4, 192), "lora_B": (192, 4)}
    name = "diffusion_model.layers.0.attention.to_q"
    content = save({f"{name}.{part}.weight": torch.full(shape, 1e30) for part, shape in factors.items()})
    assert register(open_api, "huge", content).status_code == 201
    claim_all(open_api)
    fields: dict[str, Any] = {"width": 128, "height": 128, "steps": 2, "seed": 1}
    hook = {"webhook_url": "https://example.com/hook"}
    bad = open_api.submit(**fields, **hook, loras=[{"name": "huge"}]).json()["id"]
    good = open_api.submit(**fields).json()["id"]
    generate_due(open_api)
    failed, succeeded = (open_api.get(f"/api/jobs/{job_id}").json() for job_id in (bad, good))
    assert succeeded["status"] == "succeeded"
    assert (failed["status"], failed["attempt"], failed["outputs"]) == ("failed", 1, [])
    assert (failed["error"]["code"], failed["error"]["retryable"]) == ("non_finite_values", False)
    assert failed["error"]["message"].startswith("the latents are NaN or infinite after step 1 of 2; usual causes")
    assert not list((open_api.installation.folder / "storage").glob(f"jobs/{bad}/*"))
    with open_api.database.read() as transaction:
        events = transaction.session.query(WebhookEvent).filter_by(job_id=UUID(bad)).all()
    assert [event.type for event in events] == ["job.failed"]


def test_what_does_not_fit_fails_the_job_of_a_strict_lora_and_is_listed_by_that_of_another(open_api: Api) -> None:
    foreign = {f"double_blocks.{block}.img_attn\n.alpha": torch.ones(1) for block in range(100)}
    content = save(load(NIGHT) | foreign)
    register(open_api, "whole", content)
    register(open_api, "partly", content, strict="false")
    register(open_api, "none", save(foreign), strict="false")
    claim_all(open_api)
    names = ("whole", "partly", "none")
    fields: dict[str, Any] = {"width": 64, "height": 64, "steps": 1, "seed": 1}
    ids = [open_api.submit(**fields, loras=[{"name": name}]).json()["id"] for name in names]
    generate_due(open_api)
    whole, partly, none = (open_api.get(f"/api/jobs/{job_id}").json() for job_id in ids)
    assert (whole["status"], whole["error"]["code"]) == ("failed", "invalid_lora")
    assert (none["status"], none["error"]["code"]) == ("failed", "invalid_lora")
    assert "changes no layer of this model" in none["error"]["message"]
    assert partly["status"] == "succeeded"
    assert partly["engine"]["lora_strict:partly"] == "false"
    notice = partly["engine"]["lora_notice:partly"]
    assert notice.startswith("left out (unsupported): double_blocks.0.img_attn\\n.alpha, ")
    assert notice.endswith(", and 90 more")


def claim_all(api: Api) -> None:
    """Take the jobs of other tests out of the queue."""
    with api.database.write() as transaction:
        while claims.claim(transaction, "a test", 600) is not None:
            pass


def generate_due(api: Api) -> None:
    """Run the due jobs with the demo model, in this process."""
    settings = api.installation.settings
    keys = load_keys(settings)
    storage = PatientStorage(open_storage(settings, keys.link), settings.worker.upload_retry_s, on_return=lambda: None)
    pipeline = load_pipeline(settings)
    loras = LoraCache([RegisteredLoras(api.database, storage)], pipeline.load_lora, settings.lora.cache_bytes)
    context = WorkerContext(
        api.database,
        storage,
        settings.jobs,
        settings.worker,
        name="a test",
        shutdown=Shutdown(0),
        notify=lambda _stage: None,
        on_ended=lambda: None,
        on_broken=lambda: None,
        on_hung=lambda _reason: None,
    )
    inputs = InputSource(api.database, storage, settings.webhooks, settings.limits, loras)
    worker = ImageWorker(pipeline, read_embedding, inputs, context, Marks())
    worker.drain()
    worker.finish()

"""The library of LoRAs: who may change it, what it takes, and what a submission may name of it."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.api.conftest import Api, pointers, problem
from zcore.jobs.loras import key_of
from zcore.jobs.models import Lora

TREE = Path(__file__).resolve().parents[3]
NIGHT = (TREE / "zcore" / "demo" / "loras" / "demo-night.safetensors").read_bytes()
OUTLINE = (TREE / "zcore" / "demo" / "loras" / "demo-outline.safetensors").read_bytes()
OCTETS = {"content-type": "application/octet-stream"}


@pytest.fixture(autouse=True)
def emptied(open_api: Api) -> Iterator[None]:
    """A library for each test."""
    yield
    with open_api.database.write() as transaction:
        transaction.session.query(Lora).delete()


def admin(api: Api) -> dict[str, str]:
    return {"authorization": f"Bearer {(api.installation.folder / 'keys' / 'admin').read_text().strip()}"}


def register(
    api: Api, name: str, content: bytes = NIGHT, licence: str = "Apache-2.0", **headers: str
) -> httpx.Response:
    given = headers or admin(api)
    return api.post("/api/loras", params={"name": name, "licence": licence}, content=content, headers=OCTETS | given)


def remove(api: Api, name: str, headers: dict[str, str] | None = None) -> httpx.Response:
    return api.client.delete(f"{api.url}/api/loras/{name}", headers=admin(api) if headers is None else headers)


def named(api: Api) -> list[str]:
    return [lora["name"] for lora in api.get("/api/loras").json()["loras"]]


def stored(api: Api, name: str, content: bytes) -> Path:
    return api.installation.folder / "storage" / key_of(name, hashlib.sha256(content).hexdigest())


def test_a_registered_one_is_listed_with_hash_and_licence_and_can_be_submitted(open_api: Api) -> None:
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
    }
    assert stored(open_api, "night", NIGHT).read_bytes() == NIGHT
    submitted = open_api.submit(loras=[{"name": "night", "scale": 0.5}])
    assert submitted.status_code == 202
    assert submitted.json()["request"]["loras"] == [{"name": "night", "scale": 0.5}]


def test_only_the_admin_key_changes_the_library(open_api: Api) -> None:
    problem(register(open_api, "night", authorization="Bearer anna-key-0123456789"), 401, "unauthorized")
    problem(register(open_api, "night", accept="*/*"), 401, "unauthorized")
    register(open_api, "night")
    problem(remove(open_api, "night", {}), 401, "unauthorized")
    assert named(open_api) == ["night"]


def test_the_same_file_again_is_no_error_and_another_of_its_name_is(open_api: Api) -> None:
    first = register(open_api, "night")
    assert register(open_api, "night").json() == first.json()
    problem(register(open_api, "night", OUTLINE), 409, "conflict")
    assert stored(open_api, "night", NIGHT).is_file()


def test_nothing_is_stored_of_a_file_whose_name_is_taken(open_api: Api) -> None:
    register(open_api, "night")
    before = sorted((open_api.installation.folder / "storage" / "loras").rglob("*"))
    problem(register(open_api, "night", OUTLINE), 409, "conflict")
    assert sorted((open_api.installation.folder / "storage" / "loras").rglob("*")) == before


def test_one_name_taken_many_times_at_once_has_one_winner_whose_file_is_there(open_api: Api) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(partial(register, open_api, "noon"), [NIGHT, OUTLINE] * 8))
    assert {answer.status_code for answer in answers} == {201, 409}
    (kept,) = {answer.json()["sha256"] for answer in answers if answer.status_code == 201}
    assert (open_api.installation.folder / "storage" / key_of("noon", kept)).is_file()


@pytest.mark.parametrize(
    ("name", "content", "pointer"),
    [
        ("../night", NIGHT, "/name"),
        (" night", NIGHT, "/name"),
        ("night\n", NIGHT, "/name"),
        ("night", NIGHT[:-1], "/body"),
        ("night", b"", "/body"),
        ("night", b"\x80\x04K\x01.", "/body"),
        ("night", b"PK\x03\x04" + bytes(40), "/body"),
        ("night", b"\x02" + bytes(7) + b"{}", "/body"),
    ],
)
def test_what_is_no_name_or_no_safetensors_file_is_refused(
    open_api: Api, name: str, content: bytes, pointer: str
) -> None:
    refused: dict[str, Any] = problem(register(open_api, name, content), 400, "invalid_request")
    assert pointers(refused) == {pointer}
    assert named(open_api) == []


def test_a_file_goes_with_its_name_and_under_another_name_it_stays(open_api: Api) -> None:
    register(open_api, "night")
    register(open_api, "dusk")
    assert remove(open_api, "night").status_code == 204
    assert not stored(open_api, "night", NIGHT).exists()
    assert stored(open_api, "dusk", NIGHT).is_file()
    assert remove(open_api, "dusk").status_code == 204
    assert not stored(open_api, "dusk", NIGHT).exists()
    problem(remove(open_api, "dusk"), 404, "not_found")


def test_a_submission_that_names_none_of_the_library_is_refused_with_near_ones(open_api: Api) -> None:
    register(open_api, "night")
    refused = problem(open_api.submit(loras=[{"name": "night"}, {"name": "nigth"}]), 400, "invalid_request")
    assert refused["errors"] == [
        {"pointer": "/loras/1/name", "detail": "there is no LoRA `nigth`; did you mean `night`?"}
    ]

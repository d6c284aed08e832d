"""docs/api.md documents every route, parameter and field of the API, and nothing else."""

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from server.app import create_app
from zcore.jobs.states import State
from zcore.request import Delivery, GenerationRequest
from zcore.settings import load_settings

TREE = Path(__file__).resolve().parents[2]
METHODS = ("get", "post", "put", "patch", "delete")


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The OpenAPI document of the demo profile."""
    folder = tmp_path_factory.mktemp("described")
    settings = load_settings({"ZIMAGE_PROFILE": "demo", "ZIMAGE_DATA_DIR": str(folder)})
    document: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(create_app(settings).openapi_schema.to_schema()))
    return document


@pytest.fixture(scope="module")
def page() -> str:
    """The text of docs/api.md."""
    return (TREE / "docs" / "api.md").read_text()


def test_exactly_the_existing_routes_are_listed(described: dict[str, Any], page: str) -> None:
    routes = {
        f"{method.upper()} {path}" for path, item in described["paths"].items() for method in METHODS if method in item
    }
    listed = set(re.findall(r"^\| \[`([A-Z]+ /[^`]*)`\]", page, re.MULTILINE))
    assert listed == routes


def test_every_listed_route_has_a_section(page: str) -> None:
    headings = " ".join(re.findall(r"^## (.*)$", page, re.MULTILINE))
    for route in re.findall(r"^\| \[`([A-Z]+ /[^`]*)`\]", page, re.MULTILINE):
        assert route in headings


def test_exactly_the_existing_request_fields_are_documented(page: str) -> None:
    table = page.partition("| Field |")[2].partition("\n\n")[0]
    names = set(re.findall(r"`(\w+)`", " ".join(row.split("|")[1] for row in table.splitlines()[2:])))
    assert names == {*GenerationRequest.__struct_fields__, *Delivery.__struct_fields__} - {"version"}


def test_every_query_parameter_of_the_job_list_is_documented(described: dict[str, Any], page: str) -> None:
    parameters = {entry["name"] for entry in described["paths"]["/api/jobs"]["get"]["parameters"]}
    table = page.partition("| Parameter |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", " ".join(row.split("|")[1] for row in table.splitlines()[2:]))) == parameters


def test_every_problem_of_a_submission_is_documented(described: dict[str, Any], page: str) -> None:
    responses = described["paths"]["/api/generate"]["post"]["responses"]
    table = page.partition("| Status | Code |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| (\d+)", table, re.MULTILINE)) == {status for status in responses if status >= "400"}


def test_every_status_is_explained(page: str) -> None:
    table = page.partition("| `status` |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == set(State)

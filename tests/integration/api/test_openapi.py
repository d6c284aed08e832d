"""What the API says of itself is true."""

from typing import Any

import pytest

from tests.integration.api.conftest import Api
from zcore.request import Delivery, GenerationRequest

PROBLEMS = {
    ("post", "/api/generate"): {"400", "401", "413", "415", "422", "503"},
    ("post", "/api/inputs"): {"400", "401", "413", "415", "503"},
    ("get", "/api/jobs"): {"400", "401", "503"},
    ("get", "/api/jobs/{job_id}"): {"401", "404", "503"},
    ("post", "/api/jobs/{job_id}/cancel"): {"401", "404", "503"},
    ("get", "/api/jobs/{job_id}/outputs/{position}"): {"401", "404", "410", "503"},
}
METHODS = ("get", "post", "put", "patch", "delete")


@pytest.fixture
def document(open_api: Api) -> dict[str, Any]:
    """The OpenAPI document."""
    answer = open_api.get("/schema/openapi.json")
    assert answer.status_code == 200
    found: dict[str, Any] = answer.json()
    return found


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """Method, path and description of each."""
    return [
        (method, path, item[method]) for path, item in document["paths"].items() for method in METHODS if method in item
    ]


def test_it_is_openapi_3_1_and_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1")
    waiting: list[Any] = [document]
    found = 0
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting += part
        elif isinstance(part, dict):
            if isinstance(reference := part.get("$ref"), str):
                target: Any = document
                for name in reference.removeprefix("#/").split("/"):
                    target = target[name]
                found += 1
            waiting += part.values()
    assert found > 5


def test_every_operation_is_named_described_and_declares_its_parameters(document: dict[str, Any]) -> None:
    names = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(names) == len(set(names))
    for _, path, operation in operations(document):
        assert operation["summary"], path
        declared = {entry["name"] for entry in operation.get("parameters", []) if entry["in"] == "path"}
        assert declared == {part.strip("{}") for part in path.split("/") if part.startswith("{")}, path


def test_every_problem_of_a_job_route_is_documented(document: dict[str, Any]) -> None:
    for (method, path), problems in PROBLEMS.items():
        responses = document["paths"][path][method]["responses"]
        assert problems <= set(responses), (method, path)
        for status in problems:
            (content,) = responses[status]["content"].items()
            assert content[0] == "application/problem+json", (method, path, status)


def test_the_request_is_described_with_the_bounds_that_are_checked(document: dict[str, Any]) -> None:
    schema = _body_schema(document)
    described = set(schema["properties"])
    assert described == {*GenerationRequest.__struct_fields__, *Delivery.__struct_fields__} - {"version"}
    assert schema["required"] == ["prompt"]
    width = schema["properties"]["width"]
    assert (width["minimum"], width["maximum"], width["multipleOf"]) == (64, 8192, 16)
    assert (schema["properties"]["steps"]["maximum"], schema["properties"]["n"]["maximum"]) == (50, 8)


def test_every_example_is_accepted_as_it_stands(open_api: Api, document: dict[str, Any]) -> None:
    content = document["paths"]["/api/generate"]["post"]["requestBody"]["content"]["application/json"]
    examples = content.get("examples") or _body_schema(document)["examples"]
    values = list(examples.values()) if isinstance(examples, dict) else examples
    assert len(values) >= 2
    for example in values:
        body = example.get("value", example)
        answer = open_api.post("/api/generate", json=body)
        assert answer.status_code == 202, answer.text


def test_the_answer_has_exactly_the_fields_that_are_described(open_api: Api, document: dict[str, Any]) -> None:
    accepted = document["paths"]["/api/generate"]["post"]["responses"]["202"]["content"]["application/json"]["schema"]
    described = _resolved(document, accepted)
    assert set(open_api.submit().json()) == set(described["properties"])


def test_an_upload_is_described_as_a_file(document: dict[str, Any]) -> None:
    body = document["paths"]["/api/inputs"]["post"]["requestBody"]
    assert body["required"] is True
    assert body["content"].keys() == {"image/*", "application/octet-stream"}


def test_the_key_is_declared(document: dict[str, Any]) -> None:
    assert document["components"]["securitySchemes"]["key"] == {"type": "http", "scheme": "bearer"}


def _body_schema(document: dict[str, Any]) -> dict[str, Any]:
    content = document["paths"]["/api/generate"]["post"]["requestBody"]["content"]
    return _resolved(document, content["application/json"]["schema"])


def _resolved(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in schema:
        found: dict[str, Any] = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        return found
    return schema

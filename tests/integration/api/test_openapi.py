"""The OpenAPI document says what the API accepts and answers."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from server.schemas import SUBMISSION_EXAMPLES
from tests.api_description import Description, document_of, operations
from zcore.errors import InvalidRequest
from zcore.request import SIZE_FIELDS, Delivery, GenerationDefaults, GenerationRequest, RequestLimits, parse_submission
from zcore.settings import load_settings

REFERENCE = {"$ref": "#/components/schemas/Submission"}
# One body that the parser refuses for each rule that the schema states, by what is wrong with it.
REFUSED = {
    "an unknown field": {"colour": "red"},
    "a blank prompt": {"prompt": " \n"},
    "NUL in a text": {"negative_prompt": "a\0b", "guidance_scale": 2.0},
    "a side that is no multiple of 16": {"width": 100},
    "too many steps": {"steps": 51},
    "a size that is no size": {"size": "large"},
    "an aspect ratio that is no ratio": {"aspect_ratio": "1024x768"},
    "a resolution below the smallest side": {"resolution": 63},
    "an image that is no address": {"image": "0"},
    "an upload's id that is too short": {"image": "input:abc"},
    "a mask with a password": {"image": "https://a.example/x", "mask": "https://user:word@a.example/y"},
    "a webhook that is no URL": {"webhook_url": "ftp://a.example/hook"},
    "a port that does not exist": {"webhook_url": "https://a.example:65536/hook"},
    "a layer that is skipped twice": {"slg": {"layers": [3, 3]}},
    "an unknown field of dype": {"dype": {"strength": 1}},
    "too many passes": {"passes": [{"scale": 1.0}] * 5},
    "a name of a LoRA with a newline": {"loras": [{"name": "demo\n"}]},
    "a layer that no encoder has": {"layer_weights": {"-37": 1.0}},
    "metadata that is no object": {"metadata": []},
    "a seed that is no number": {"seed": "0x1"},
    "an unknown version": {"version": 2},
}
ACCEPTED: dict[str, Any] = {
    "a preset": {"size": "landscape_16_9"},
    "two sides": {"size": "1536x864"},
    "the default size": {"size": "auto"},
    "a ratio and a resolution": {"aspect_ratio": "21:9", "resolution": 1536},
    "an upload": {"image": f"input:{'0' * 64}"},
    "an output": {"image": "output:01a20719-4142-7484-a819-b2b18c8b5dd4/0"},
    "an address with a port": {"webhook_url": "https://[2001:db8::1]:8443/hook?x=1#y"},
    "a seed as text": {"seed": "9223372036854775807"},
    "whole numbers with a point": {"steps": 8.0, "seed": 1e3},
    "no guidance": {"slg": None, "dype": None},
    "a blend of layers": {"layer_weights": {"-36": 0.5, "-1": 1}},
}


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Description:
    """The document of a keyless server."""
    return Description(_document(tmp_path_factory.mktemp("open"), {"ZIMAGE_SERVER__KEYLESS": "true"}))


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The document of a server with its generated API key and a public address."""
    return _document(tmp_path_factory.mktemp("keyed"), {"ZIMAGE_SERVER__PUBLIC_URL": "https://images.example/"})


def test_the_document_is_openapi_3_1_without_dangling_references(described: Description) -> None:
    assert described.document["openapi"].startswith("3.1")
    pending: list[Any] = [described.document]
    found = 0
    while pending:
        part = pending.pop()
        if isinstance(part, list):
            pending += part
        elif isinstance(part, dict):
            if isinstance(reference := part.get("$ref"), str):
                target: Any = described.document
                for name in reference.removeprefix("#/").split("/"):
                    target = target[name]
                found += 1
            pending += part.values()
    assert found > 50


def test_operations_are_named_like_functions_and_have_their_path_parameters(described: Description) -> None:
    names = [operation["operationId"] for _, _, operation in operations(described.document)]
    assert len(names) == len(set(names))
    assert {"submit_job", "get_job", "list_jobs", "cancel_job", "upload_input", "register_lora"} < set(names)
    tags = {tag["name"] for tag in described.document["tags"]}
    for _, path, operation in operations(described.document):
        assert operation["summary"], path
        assert set(operation["tags"]) <= tags, path
        declared = {entry["name"] for entry in operation.get("parameters", []) if entry["in"] == "path"}
        assert declared == {part.strip("{}") for part in path.split("/") if part.startswith("{")}, path


def test_every_refusal_is_declared_as_a_problem(described: Description) -> None:
    for method, path, operation in operations(described.document):
        for status, response in operation["responses"].items():
            if status >= "400" and path != "/health/ready":
                expected = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
                assert response.get("content") in (expected, None), (method, path, status)
    submit = described.document["paths"]["/api/generate"]["post"]["responses"]
    assert {"200", "202", "400", "401", "413", "415", "422", "500", "503"} <= set(submit)
    assert submit["401"]["headers"]["WWW-Authenticate"]["required"] is True


def test_the_document_states_which_key_a_route_requires(described: Description, keyed: dict[str, Any]) -> None:
    def required(document: dict[str, Any], path: str, method: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = document["paths"][path][method]["security"]
        return found

    for document, caller in ((described.document, [{}, {"key": []}]), (keyed, [{"key": []}])):
        assert "security" not in document
        assert required(document, "/api/generate", "post") == caller
        assert required(document, "/api/jobs/{job_id}", "get") == caller
        assert required(document, "/api/loras", "get") == caller
        assert required(document, "/api/loras", "post") == [{"admin_key": []}]
        assert required(document, "/api/loras/{name}", "delete") == [{"admin_key": []}]
        assert required(document, "/health/live", "get") == []
        assert required(document, "/files/{key}", "get") == []
    assert set(keyed["components"]["securitySchemes"]) == {"key", "admin_key"}


def test_the_server_is_the_documents_own_unless_an_address_is_configured(
    described: Description, keyed: dict[str, Any]
) -> None:
    assert described.document["servers"] == [{"url": "/"}]
    assert keyed["servers"] == [{"url": "https://images.example"}]


def test_a_submission_has_exactly_the_fields_that_the_parser_accepts(described: Description) -> None:
    schema = described.document["components"]["schemas"]["Submission"]
    names = {*GenerationRequest.__struct_fields__, *SIZE_FIELDS, *Delivery.__struct_fields__}
    assert set(schema["properties"]) == names
    assert (schema["required"], schema["additionalProperties"]) == (["prompt"], False)
    for name in names:
        with pytest.raises(InvalidRequest) as refused:
            _parse({"prompt": "a fox", name: object()})
        assert not any("known field" in error.detail for error in refused.value.errors), name
    for path in ("/api/generate", "/api/format-prompt"):
        body = described.document["paths"][path]["post"]["requestBody"]
        assert body["content"]["application/json"]["schema"] == REFERENCE


def test_only_defaults_that_settings_do_not_change_are_stated(described: Description) -> None:
    schemas = described.document["components"]["schemas"]
    stated = {name for name, field in schemas["Submission"]["properties"].items() if "default" in field}
    assert stated.isdisjoint({"seed", *GenerationDefaults.__struct_fields__})
    assert {"n", "format", "priority", "strength"} <= stated
    nested = [*schemas["Dype"]["properties"].values(), *schemas["SkipLayerGuidance"]["properties"].values()]
    assert not any("default" in field for field in nested)


@pytest.mark.parametrize("fields", REFUSED.values(), ids=REFUSED.keys())
def test_schema_and_parser_refuse_the_same(described: Description, fields: dict[str, Any]) -> None:
    body = {"prompt": "a fox", **fields}
    assert described.errors(REFERENCE, body)
    with pytest.raises(InvalidRequest):
        _parse(body)


@pytest.mark.parametrize("fields", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_schema_and_parser_accept_the_same(described: Description, fields: dict[str, Any]) -> None:
    body = {"prompt": "a fox", **fields}
    assert described.errors(REFERENCE, body) == []
    _parse(body)


def test_every_example_is_accepted(described: Description) -> None:
    content = described.document["paths"]["/api/generate"]["post"]["requestBody"]["content"]["application/json"]
    assert content["examples"].keys() == SUBMISSION_EXAMPLES.keys()
    demo = load_settings({"ZIMAGE_PROFILE": "demo"})
    for name, example in content["examples"].items():
        assert described.errors(REFERENCE, example["value"]) == [], name
        parse_submission(example["value"], demo.generation_defaults(None), demo.limits)


def test_a_stored_request_can_be_submitted_again(described: Description) -> None:
    for example in SUBMISSION_EXAMPLES.values():
        stored = msgspec.to_builtins(_parse(example).request)
        assert described.errors(REFERENCE, stored) == []
        assert described.errors(described.named("GenerationRequest"), stored) == []
        assert msgspec.to_builtins(_parse(stored).request) == stored


def test_a_job_is_described_down_to_its_last_object(described: Description) -> None:
    schemas = described.document["components"]["schemas"]
    job = schemas["JobResource"]
    assert job["properties"]["status"] == {"$ref": "#/components/schemas/State"}
    assert set(schemas["State"]["enum"]) == {"queued", "running", "succeeded", "failed", "canceled", "expired"}
    shapes = {"request": "GenerationRequest", "metrics": "JobMetrics", "engine": "JobEngine", "urls": "JobUrls"}
    for name, shape in shapes.items():
        assert job["properties"][name] == {"$ref": f"#/components/schemas/{shape}"}
    assert set(job["required"]) == set(job["properties"])
    assert job["properties"]["created_at"] == {"type": "string", "format": "date-time"}


def test_a_part_of_an_image_is_described_with_its_range(described: Description) -> None:
    responses = described.document["paths"]["/files/{key}"]["get"]["responses"]
    whole, part = responses["200"]["headers"], responses["206"]["headers"]
    assert part.keys() == {*whole, "Content-Range"}
    assert responses["416"]["headers"].keys() == {"Content-Range", "X-Request-Id"}


def test_an_upload_is_described_as_a_file(described: Description) -> None:
    body = described.document["paths"]["/api/inputs"]["post"]["requestBody"]
    assert body["required"] is True
    assert body["content"].keys() == {"image/*", "application/octet-stream"}


def test_each_webhook_is_described_with_its_signature(described: Description) -> None:
    assert described.document["webhooks"].keys() == {"job.succeeded", "job.failed", "job.canceled"}
    for item in described.document["webhooks"].values():
        names = {parameter["name"] for parameter in item["post"]["parameters"]}
        assert names == {"webhook-id", "webhook-timestamp", "webhook-signature"}


def _parse(body: dict[str, Any]) -> Any:
    return parse_submission(body, GenerationDefaults(), RequestLimits())


def _document(folder: Path, given: dict[str, str] | None = None) -> dict[str, Any]:
    settings = {"ZIMAGE_PROFILE": "demo", "ZIMAGE_DATA_DIR": str(folder), **(given or {})}
    return document_of(load_settings(settings))

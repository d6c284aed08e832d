"""Lists of templates and sizes, and the preview of a formatted prompt."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.integration.api.conftest import Api, pointers, problem
from zcore.prompt.templates import TemplateLibrary
from zcore.settings import TREE

SHIPPED = TemplateLibrary.load(TREE / "templates" / "z_image")


def test_every_template_is_listed_by_category_and_name(open_api: Api) -> None:
    listed = open_api.get("/api/templates").json()["templates"]
    assert {entry["name"] for entry in listed} == set(SHIPPED.names())
    assert len(listed) >= 160
    assert listed == sorted(listed, key=lambda entry: (entry["category"], entry["name"]))
    assert {"photography", "art_oil"} <= {entry["name"] for entry in listed}
    assert all(entry["description"] for entry in listed)


def test_templates_are_found_by_category_and_text(open_api: Api) -> None:
    photos = open_api.get("/api/templates", params={"category": "photography"}).json()["templates"]
    assert {entry["category"] for entry in photos} == {"photography"}
    found = open_api.get("/api/templates", params={"text": "WATERCOLO"}).json()["templates"]
    assert {"watercolor_loose", "watercolor_botanical"} <= {entry["name"] for entry in found}
    assert len(found) < len(SHIPPED.names())
    assert open_api.get("/api/templates", params={"category": "nothing"}).json() == {"templates": []}


def test_a_template_has_its_system_prompt_and_an_unknown_name_gets_suggestions(open_api: Api) -> None:
    shown = open_api.get("/api/templates/photography").json()
    assert shown["system_prompt"] == SHIPPED.get("photography").body
    refused = problem(open_api.get("/api/templates/fotography"), 404, "not_found")
    assert "`photography`" in refused["detail"]


def test_a_formatted_prompt_has_its_text_and_token_count(open_api: Api) -> None:
    shown = open_api.post("/api/format-prompt", json={"prompt": "a fox"}).json()
    assert shown["formatted"] == "<|im_start|>user\na fox<|im_end|>\n<|im_start|>assistant\n"
    assert shown["limit"] == 1504
    assert 8 < shown["tokens"] == shown["used_tokens"] < 16
    block = open_api.post("/api/format-prompt", json={"prompt": "a fox", "force_think_block": True}).json()
    assert block["formatted"].endswith("<think>\n\n</think>\n\n")
    assert block["tokens"] > shown["tokens"]


def test_request_fields_override_the_template(open_api: Api) -> None:
    def formatted(**fields: Any) -> str:
        return open_api.post("/api/format-prompt", json={"prompt": "a fox", **fields}).json()["formatted"]

    assert SHIPPED.get("photography").body in formatted(template="photography")
    own = formatted(template="photography", system_prompt="Draw with mud.")
    assert own.startswith("<|im_start|>system\nDraw with mud.<|im_end|>")
    assert SHIPPED.get("photography").body not in own
    assert formatted(template="photography", system_prompt="") == formatted()


@pytest.mark.parametrize("mode", ["interpolate", "truncate"])
def test_a_prompt_over_the_limit_is_counted_and_accepted(open_api: Api, mode: str) -> None:
    body = {"prompt": "fox " * 4000, "long_prompt_mode": mode}
    shown = open_api.post("/api/format-prompt", json=body).json()
    assert shown["tokens"] > 1504
    assert (shown["used_tokens"], shown["long_prompt_mode"]) == (1504, mode)
    assert open_api.post("/api/generate", json=body).status_code == 202


def test_a_prompt_over_the_limit_is_refused_in_refuse_mode(open_api: Api) -> None:
    refused = open_api.post("/api/generate", json={"prompt": "fox " * 4000, "long_prompt_mode": "refuse"})
    document = problem(refused, 400, "prompt_too_long")
    assert pointers(document) == {"/prompt"}
    assert "1504" in document["detail"]


def test_thinking_content_over_the_limit_is_refused_in_every_mode(open_api: Api) -> None:
    body = {"prompt": "a fox", "thinking_content": "hm " * 5000}
    problem(open_api.post("/api/generate", json=body), 400, "prompt_too_long")


def test_a_prompt_that_would_be_refused_has_no_used_tokens(open_api: Api) -> None:
    for body in (
        {"prompt": "fox " * 4000, "long_prompt_mode": "refuse"},
        {"prompt": "a fox", "thinking_content": "hm " * 5000},
    ):
        shown = open_api.post("/api/format-prompt", json=body).json()
        assert shown["tokens"] > shown["limit"]
        assert shown["used_tokens"] is None


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"hidden_layer": -36}, "/hidden_layer"),
        ({"layer_weights": {"-2": 1.0, "-6": 1.0}}, "/layer_weights"),
        ({"slg": {"layers": [5]}}, "/slg/layers"),
    ],
)
def test_a_layer_that_the_model_does_not_have_is_refused(open_api: Api, fields: dict[str, Any], pointer: str) -> None:
    assert pointers(problem(open_api.submit(**fields), 400, "invalid_request")) == {pointer}


def test_the_negative_prompt_is_counted_too(open_api: Api) -> None:
    body = {"prompt": "a fox", "negative_prompt": "fox " * 4000, "guidance_scale": 2.0, "long_prompt_mode": "refuse"}
    assert pointers(problem(open_api.post("/api/generate", json=body), 400, "prompt_too_long")) == {"/negative_prompt"}


def test_an_invalid_field_of_a_preview_is_named(open_api: Api) -> None:
    document = problem(
        open_api.post("/api/format-prompt", json={"prompt": "a", "hidden_layer": 0}), 400, "invalid_request"
    )
    assert pointers(document) == {"/hidden_layer"}


def test_sizes_are_listed_at_the_default_resolution_with_their_limits(open_api: Api) -> None:
    sizes = open_api.get("/api/sizes").json()
    assert sizes["default"] == {"width": 128, "height": 128}
    assert sizes["limits"] == {
        "smallest_side_px": 64, "largest_side_px": 8192, "multiple_px": 16, "max_pixels": 1048576,
    }  # fmt: skip
    assert {128, 256, 320, 384} == set(sizes["resolutions"])
    by_name = {entry["name"]: entry for entry in [*sizes["presets"], *sizes["ratios"]]}
    assert by_name["landscape_16_9"] == {"name": "landscape_16_9", "ratio": "16:9", "width": 176, "height": 96}
    for name, entry in by_name.items():
        accepted = open_api.submit(size=name).json()["request"]
        assert (accepted["width"], accepted["height"]) == (entry["width"], entry["height"]), name


@pytest.mark.parametrize("path", ["/api/templates", "/api/templates/photography", "/api/sizes"])
def test_lists_require_a_key_if_keys_are_configured(keyed_api: Api, path: str) -> None:
    problem(keyed_api.get(path), 401, "unauthorized")
    assert keyed_api.as_("anna").get(path).status_code == 200


def test_the_preview_loads_no_torch() -> None:
    program = (
        "import sys\n"
        "from zcore.settings import load_settings\n"
        "from server.prompt_check import PromptCheck\n"
        "from zcore.request import GenerationRequest\n"
        "settings = load_settings({'ZIMAGE_PROFILE': 'demo'})\n"
        "check = PromptCheck.load(settings.templates_paths, settings.model_location)\n"
        "print(check.format(GenerationRequest(prompt='a fox')).tokens, 'torch' in sys.modules)\n"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=TREE)
    tokens, torch_loaded = finished.stdout.split()
    assert json.loads(tokens) > 8
    assert torch_loaded == "False"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_a_preview_with_the_media_type_of_a_form_is_refused(open_api: Api, kind: str) -> None:
    answer = open_api.post("/api/format-prompt", content='{"prompt": "a fox"}', headers={"content-type": kind})
    problem(answer, 415, "unsupported_media_type")

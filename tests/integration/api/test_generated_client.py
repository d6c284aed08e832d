"""A client that openapi-python-client generates from our document submits every field as it is.

The generator comes from the package index: without one, these tests fail.
"""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from bin.environment import uv_tool
from server.schemas import SubmissionBody
from tests.integration.api.conftest import KEYS, Api
from zcore.jobs import lora_library, queries
from zcore.jobs.lora_library import UploadedLora

GENERATOR = "openapi-python-client==0.29.1"
CALLS = Path(__file__).with_name("generated_client_calls.py")
SLG = {"scale": 2.0, "layers": [1, 2], "start": 0.1, "stop": 0.4}
DYPE = {
    "method": "yarn",
    "scale": 1.5,
    "exponent": 1.0,
    "start_sigma": 0.5,
    "base_resolution": 512,
    "anisotropic": True,
    "dynamic": False,
}
EVERYTHING: dict[str, Any] = {
    "version": 1,
    "prompt": 'a "fox" in snow',
    "negative_prompt": "people",
    "template": "photography",
    "system_prompt": "Answer briefly.",
    "thinking_content": "Let me think.",
    "assistant_content": "Here it is.",
    "force_think_block": True,
    "strip_quotes": True,
    "clean_whitespace": True,
    "hidden_layer": -1,
    "layer_weights": {"-2": 0.75, "-1": 0.25},
    "long_prompt_mode": "pool",
    "width": 192,
    "height": 128,
    "steps": 5,
    "shift": 2.5,
    "guidance_scale": 3.5,
    "cfg_normalization": 1.5,
    "cfg_truncation": 0.5,
    "slg": SLG,
    "dype": DYPE,
    "image": "https://images.example/fox.png",
    "mask": "https://images.example/mask.png",
    "strength": 0.5,
    "strength_rule": "diffusers",
    "fit": "contain",
    "keep_unmasked": False,
    "tiled_vae": True,
    "loras": [{"name": "night", "scale": -0.5}],
    "seed": 2**63 - 1,
    "n": 3,
    "format": "webp",
    "quality": 70,
    "webhook_url": "https://caller.example/hook",
    "metadata": {"order": {"id": "A-1", "lines": [1, 2.5, None]}},
    "priority": -3,
}
IN_PASSES: dict[str, Any] = {
    "prompt": "a fox",
    "width": 256,
    "height": 256,
    "passes": [
        {"scale": 0.5, "steps": 3, "shift": 2.0, "guidance_scale": 1.5, "slg": SLG},
        {"scale": 1.0, "strength": 0.4, "dype": DYPE},
    ],
}
# Ways to give a size or a seed that are stored in another form: body, and what is stored.
TRANSLATED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"prompt": "a", "size": "256x128"}, {"width": 256, "height": 128}),
    ({"prompt": "a", "aspect_ratio": "16:9", "resolution": 256}, {"width": 336, "height": 192}),
    ({"prompt": "a", "seed": "9007199254740993"}, {"seed": 9007199254740993}),
]
FIELDS = {*SubmissionBody.__struct_fields__}
Submit = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def submit(keyed_api: Api, tmp_path_factory: pytest.TempPathFactory) -> Submit:
    """Return a function that submits bodies with a generated client, as `generated_client_calls` does."""
    folder = tmp_path_factory.mktemp("generated")
    (folder / "openapi.json").write_bytes(keyed_api.client.get(f"{keyed_api.url}/schema/openapi.json").content)
    generate = ["openapi-python-client", "generate", "--meta", "none"]
    _run(*generate, "--path", str(folder / "openapi.json"), "--output-path", str(folder / "zimage_client"))

    def submit(bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        called = _run("python", str(CALLS), str(folder / "zimage_client"), keyed_api.url, KEYS["anna"], text=bodies)
        return list(json.loads(called))

    return submit


def test_every_field_arrives_as_it_was_sent(keyed_api: Api, submit: Submit) -> None:
    assert {*EVERYTHING, *IN_PASSES, *(name for body, _ in TRANSLATED for name in body)} == FIELDS
    with keyed_api.database.write() as transaction:
        lora_library.register(transaction, UploadedLora("night", "a" * 64, "Apache-2.0", 1), "loras/night")
    expected = [(EVERYTHING, EVERYTHING), (IN_PASSES, IN_PASSES), *TRANSLATED]
    bodies = [body for body, _ in expected]
    for (body, wanted), call in zip(expected, submit(bodies), strict=True):
        assert call["sent"] == body
        assert call["shape"] == "JobResource", call["answer"]
        with keyed_api.database.read() as transaction:
            job = queries.get(transaction, UUID(call["answer"]["id"]))
        delivery = {"metadata": job.caller_metadata, "webhook_url": job.webhook_url, "priority": job.priority}
        assert _part_of({**job.request, **delivery}, like=wanted) == wanted
        assert (call["answer"]["request"], call["answer"]["metadata"]) == (job.request, job.caller_metadata)


def test_a_refusal_is_a_typed_problem(submit: Submit) -> None:
    (call,) = submit([{"prompt": "a fox", "width": 100}])
    assert call["shape"] == "Problem"
    assert (call["answer"]["status"], call["answer"]["code"]) == (400, "invalid_request")
    assert [error["pointer"] for error in call["answer"]["errors"]] == ["/width"]


def _run(*command: str, text: Any = None) -> str:
    ran = subprocess.run([*uv_tool(GENERATOR), *command], input=json.dumps(text), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def _part_of(stored: Any, like: Any) -> Any:
    """Return those fields of a stored value, and of the objects in it, that `like` has too."""
    if isinstance(like, dict) and isinstance(stored, dict):
        return {name: _part_of(stored[name], value) for name, value in like.items() if name in stored}
    if isinstance(like, list) and isinstance(stored, list) and len(like) == len(stored):
        return [_part_of(*pair) for pair in zip(stored, like, strict=True)]
    return stored

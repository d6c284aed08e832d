"""With the embedding cache or without it, every request has the same embedding."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zcore.errors import ZImageError
from zcore.imaging.prompt_encoder import PromptEncoder
from zcore.request import GenerationRequest

TREE = Path(__file__).resolve().parents[3]
CAPTION_FRAMES = 66
"""Places that the checkpoint has for a prompt; 64 of them are for its tokens, so that many prompts are too long."""

SHORT = st.text('ab "\n', min_size=1, max_size=8)
TEXTS = SHORT | st.builds(lambda word: f"{word} " * 30, SHORT)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "prompt": TEXTS,
    "negative_prompt": TEXTS,
    "template": st.sampled_from([None, "photography", "anime_modern"]),
    "system_prompt": st.none() | SHORT,
    "thinking_content": st.none() | SHORT,
    "assistant_content": st.none() | SHORT,
    "force_think_block": st.sampled_from([None, False, True]),
    "strip_quotes": st.booleans(),
    "clean_whitespace": st.booleans(),
    "hidden_layer": st.sampled_from([-2, -1, -3]),
    "layer_weights": st.sampled_from([{}, {"-2": 1.0}, {"-1": 0.5, "-3": 0.5}, {"-1": 0.25, "-3": 0.75}]),
    "long_prompt_mode": st.sampled_from(["interpolate", "pool", "attention_pool", "truncate", "refuse"]),
    "guidance_scale": st.sampled_from([0.0, 2.0]),
}
"""Every field that reaches the text encoder."""


@pytest.fixture(scope="module")
def folder(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint with few places for a prompt."""
    folder = tmp_path_factory.mktemp("short") / "checkpoint"
    folder.mkdir()
    for part in demo_folder.iterdir():
        if part.name != "transformer":
            (folder / part.name).symlink_to(part)
    config = json.loads((demo_folder / "transformer" / "config.json").read_text())
    config["axes_lens"][0] = CAPTION_FRAMES
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    return folder


def loaded(folder: Path, cache_bytes: int) -> PromptEncoder:
    templates = TREE / "templates" / "z_image"
    return PromptEncoder.from_pretrained(
        folder, device="cpu", torch_dtype="float32", templates_dir=templates, embedding_cache_bytes=cache_bytes
    )


@pytest.fixture(scope="module")
def plain(folder: Path) -> PromptEncoder:
    return loaded(folder, 0)


@pytest.fixture(scope="module")
def caching(folder: Path) -> PromptEncoder:
    """Keeps its cache from example to example."""
    return loaded(folder, 2**26)


def outcome(encoder: PromptEncoder, request: GenerationRequest) -> tuple[object, ...]:
    """All that an embedding consists of, or the refusal; tensors bit for bit."""
    try:
        embedding = encoder.encode(request)
    except ZImageError as refusal:
        return (type(refusal), refusal.message)
    return tuple(
        (value.shape, value.numpy().tobytes()) if isinstance(value, torch.Tensor) else value
        for value in (getattr(embedding, field.name) for field in dataclasses.fields(embedding))
    )


@pytest.mark.parametrize("changed", FIELDS)
@settings(max_examples=12)
@given(st.data())
def test_a_request_that_differs_in_one_field_has_the_embedding_of_an_encoder_without_a_cache(
    plain: PromptEncoder, caching: PromptEncoder, changed: str, data: st.DataObject
) -> None:
    # Half of the prompts are too long, so that the mode decides about them; guided, so that both prompts are encoded.
    fields: dict[str, Any] = {"prompt": data.draw(TEXTS), "negative_prompt": data.draw(TEXTS), "guidance_scale": 2.0}
    for value in (data.draw(FIELDS[changed], label="before"), data.draw(FIELDS[changed], label="after")):
        request = GenerationRequest(**{**fields, changed: value})
        assert outcome(caching, request) == outcome(plain, request)


def test_a_request_that_is_repeated_comes_from_the_cache(caching: PromptEncoder) -> None:
    request = GenerationRequest(prompt="a fox in snow")
    caching.encode(request)
    before = caching.cache_statistics()
    caching.encode(request)
    assert (caching.cache_statistics().hits, caching.cache_statistics().misses) == (before.hits + 1, before.misses)

"""The embedding is the hidden state asked for, and nothing above it is run."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen3Model

from zcore.errors import CheckpointError
from zcore.imaging.text.encoder import TextEncoder

IDS = [257, 84, 104, 105, 258, 10, 257, 65]


@pytest.fixture
def language_model(tiny_folder: Path) -> Qwen3Model:
    """Four blocks. Fresh for each test: the encoder cuts it."""
    return Qwen3Model.from_pretrained(tiny_folder / "text_encoder", dtype=torch.float32).eval()


@pytest.mark.parametrize("hidden_layer", [-1, -2, -3, -4])
def test_each_layer_is_the_one_that_transformers_counts(language_model: Qwen3Model, hidden_layer: int) -> None:
    with torch.inference_mode():
        states = language_model(input_ids=torch.tensor([IDS]), output_hidden_states=True).hidden_states
        assert len(states) == 5
        expected = states[hidden_layer][0]
        embedding = TextEncoder(language_model, torch.device("cpu"), hidden_layer).encode(IDS)
    assert embedding.shape == (len(IDS), 64)
    assert torch.equal(embedding, expected)


def test_blocks_above_the_layer_are_gone(language_model: Qwen3Model) -> None:
    TextEncoder(language_model, torch.device("cpu"), -2)
    assert len(language_model.layers) == 3
    assert not list(language_model.norm.parameters())


@pytest.mark.parametrize("hidden_layer", [0, 1, -5, -36])
def test_a_layer_that_the_model_lacks_is_refused(language_model: Qwen3Model, hidden_layer: int) -> None:
    with pytest.raises(CheckpointError, match=f"hidden_layer: {hidden_layer}; .* -4 to -1"):
        TextEncoder(language_model, torch.device("cpu"), hidden_layer)


def test_the_embedding_has_the_models_dtype(tiny_folder: Path) -> None:
    model = Qwen3Model.from_pretrained(tiny_folder / "text_encoder", dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        assert TextEncoder(model, torch.device("cpu"), -2).encode(IDS).dtype == torch.bfloat16

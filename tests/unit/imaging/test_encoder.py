"""The embedding is the requested hidden state, alone or in a batch, and no block above it runs."""

from pathlib import Path
from typing import cast

import pytest
import torch
from torch import nn
from transformers import Qwen3Model

from tests.numerics import ONE_FORWARD, assert_close_relative
from zcore.errors import InvalidRequest
from zcore.imaging.architecture.text_network import TextNetwork
from zcore.imaging.text.text_encoder import LayerBlend, TextEncoder
from zcore.imaging.weights.loader import Placement, load_text_encoder
from zcore.request import GenerationRequest

IDS = [257, 84, 104, 105, 258, 10, 257, 65]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def language_model(tiny_folder: Path) -> Qwen3Model:
    """Four blocks."""
    return Qwen3Model.from_pretrained(tiny_folder / "text_encoder", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def network(tiny_folder: Path) -> nn.Module:
    """The same blocks, as the loader builds them."""
    return load_text_encoder(tiny_folder, Placement(CPU, torch.float32))


@pytest.fixture
def encoder(network: nn.Module) -> TextEncoder:
    return TextEncoder(network, CPU)


def one(layer: int) -> LayerBlend:
    return LayerBlend(((layer, 1.0),))


def states_of_transformers(model: Qwen3Model) -> tuple[torch.Tensor, ...]:
    with torch.inference_mode():
        states = model(input_ids=torch.tensor([IDS]), output_hidden_states=True).hidden_states
    assert len(states) == 5
    return tuple(state[0] for state in states)


@pytest.mark.numeric
@pytest.mark.parametrize("hidden_layer", [-1, -2, -3, -4])
def test_layers_are_numbered_as_in_transformers(
    language_model: Qwen3Model, encoder: TextEncoder, hidden_layer: int
) -> None:
    with torch.inference_mode():
        embedding = encoder.encode(IDS, one(hidden_layer))
    assert embedding.shape == (len(IDS), 64)
    assert torch.equal(embedding, states_of_transformers(language_model)[hidden_layer])


@pytest.mark.parametrize(("hidden_layer", "count"), [(-1, 4), (-2, 3), (-4, 1)])
def test_only_the_blocks_below_the_layer_are_run(
    network: nn.Module, encoder: TextEncoder, hidden_layer: int, count: int
) -> None:
    ran: list[int] = []
    hooks = [
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
        for index, block in enumerate(cast(TextNetwork, network).layers)
    ]
    with torch.inference_mode():
        encoder.encode(IDS, one(hidden_layer))
    for hook in hooks:
        hook.remove()
    assert ran == list(range(count))


@pytest.mark.numeric
def test_a_blend_is_the_weighted_mean_of_its_layers(language_model: Qwen3Model, encoder: TextEncoder) -> None:
    blend = LayerBlend.of(GenerationRequest(prompt="a", layer_weights={"-1": 3.0, "-3": 1.0}))
    assert blend.weights == ((-3, 0.25), (-1, 0.75))
    states = states_of_transformers(language_model)
    with torch.inference_mode():
        mixed = encoder.encode(IDS, blend)
    assert_close_relative(mixed, 0.25 * states[-3] + 0.75 * states[-1], roundings=3)


def test_a_blend_of_one_layer_is_that_layer(encoder: TextEncoder) -> None:
    blend = LayerBlend.of(GenerationRequest(prompt="a", layer_weights={"-3": 7.0}))
    with torch.inference_mode():
        assert torch.equal(encoder.encode(IDS, blend), encoder.encode(IDS, one(-3)))
    assert str(blend) == "-3"


@pytest.mark.numeric
@pytest.mark.parametrize("blend", [one(-2), LayerBlend(((-4, 0.5), (-1, 0.5)))], ids=str)
def test_a_batch_of_four_prompts_equals_four_single_runs(encoder: TextEncoder, blend: LayerBlend) -> None:
    prompts = [IDS, IDS[:3], [*IDS, *IDS, 66, 67], [257, 65, 66, 258, 10]]
    with torch.inference_mode():
        together = encoder.encode_batch(prompts, blend)
        alone = [encoder.encode(ids, blend) for ids in prompts]
    for batched, single, ids in zip(together, alone, prompts, strict=True):
        assert batched.shape == single.shape == (len(ids), 64)
        assert_close_relative(batched, single, roundings=ONE_FORWARD)
        assert single.std() > 0.01


@pytest.mark.parametrize("hidden_layer", [-5, -36])
def test_a_layer_that_the_model_lacks_is_refused(encoder: TextEncoder, hidden_layer: int) -> None:
    with pytest.raises(InvalidRequest, match=rf"hidden_layer: {hidden_layer} does not exist; .* -4 to -1"):
        encoder.encode(IDS, one(hidden_layer))


def test_the_embedding_has_the_models_dtype(tiny_folder: Path) -> None:
    model = load_text_encoder(tiny_folder, Placement(CPU, torch.bfloat16))
    with torch.inference_mode():
        for blend in (one(-2), LayerBlend(((-2, 0.5), (-1, 0.5)))):
            assert TextEncoder(model, CPU).encode(IDS, blend).dtype == torch.bfloat16

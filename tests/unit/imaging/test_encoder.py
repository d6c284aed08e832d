"""The embedding is the hidden state asked for, alone or in a batch, and nothing above it is run."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen3Model

from zcore.errors import InvalidRequest
from zcore.imaging.text.encoder import LayerBlend, TextEncoder
from zcore.request import GenerationRequest

IDS = [257, 84, 104, 105, 258, 10, 257, 65]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def language_model(tiny_folder: Path) -> Qwen3Model:
    """Four blocks."""
    return Qwen3Model.from_pretrained(tiny_folder / "text_encoder", dtype=torch.float32).eval()


@pytest.fixture
def encoder(language_model: Qwen3Model) -> TextEncoder:
    return TextEncoder(language_model, CPU)


def one(layer: int) -> LayerBlend:
    return LayerBlend(((layer, 1.0),))


def by_transformers(model: Qwen3Model) -> tuple[torch.Tensor, ...]:
    with torch.inference_mode():
        states = model(input_ids=torch.tensor([IDS]), output_hidden_states=True).hidden_states
    assert len(states) == 5
    return tuple(state[0] for state in states)


@pytest.mark.parametrize("hidden_layer", [-1, -2, -3, -4])
def test_each_layer_is_the_one_that_transformers_counts(
    language_model: Qwen3Model, encoder: TextEncoder, hidden_layer: int
) -> None:
    with torch.inference_mode():
        embedding = encoder.encode(IDS, one(hidden_layer))
    assert embedding.shape == (len(IDS), 64)
    assert torch.equal(embedding, by_transformers(language_model)[hidden_layer])


@pytest.mark.parametrize(("hidden_layer", "run"), [(-1, 4), (-2, 3), (-4, 1)])
def test_only_the_blocks_below_the_layer_are_run(
    language_model: Qwen3Model, encoder: TextEncoder, hidden_layer: int, run: int
) -> None:
    ran: list[int] = []
    hooks = [
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
        for index, block in enumerate(language_model.layers)
    ]
    with torch.inference_mode():
        encoder.encode(IDS, one(hidden_layer))
    for hook in hooks:
        hook.remove()
    assert ran == list(range(run))


def test_a_blend_is_the_weighted_mean_of_its_layers(language_model: Qwen3Model, encoder: TextEncoder) -> None:
    blend = LayerBlend.of(GenerationRequest(prompt="a", layer_weights={"-1": 3.0, "-3": 1.0}))
    assert blend.weights == ((-3, 0.25), (-1, 0.75))
    states = by_transformers(language_model)
    with torch.inference_mode():
        mixed = encoder.encode(IDS, blend)
    torch.testing.assert_close(mixed, 0.25 * states[-3] + 0.75 * states[-1], atol=1e-6, rtol=0)


def test_a_blend_of_one_layer_is_that_layer(encoder: TextEncoder) -> None:
    blend = LayerBlend.of(GenerationRequest(prompt="a", layer_weights={"-3": 7.0}))
    with torch.inference_mode():
        assert torch.equal(encoder.encode(IDS, blend), encoder.encode(IDS, one(-3)))
    assert str(blend) == "-3"


@pytest.mark.parametrize("blend", [one(-2), LayerBlend(((-4, 0.5), (-1, 0.5)))], ids=str)
def test_a_batch_of_four_prompts_equals_four_single_runs(encoder: TextEncoder, blend: LayerBlend) -> None:
    prompts = [IDS, IDS[:3], [*IDS, *IDS, 66, 67], [257, 65, 66, 258, 10]]
    with torch.inference_mode():
        together = encoder.encode_batch(prompts, blend)
        alone = [encoder.encode(ids, blend) for ids in prompts]
    for batched, single, ids in zip(together, alone, prompts, strict=True):
        assert batched.shape == single.shape == (len(ids), 64)
        assert (batched - single).abs().max() <= 1e-5
        assert single.std() > 0.01


@pytest.mark.parametrize("hidden_layer", [-5, -36])
def test_a_layer_that_the_model_lacks_is_refused(encoder: TextEncoder, hidden_layer: int) -> None:
    with pytest.raises(InvalidRequest, match=rf"hidden_layer: {hidden_layer}; .* -4 to -1"):
        encoder.encode(IDS, one(hidden_layer))


def test_the_embedding_has_the_models_dtype(tiny_folder: Path) -> None:
    model = Qwen3Model.from_pretrained(tiny_folder / "text_encoder", dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        for blend in (one(-2), LayerBlend(((-2, 0.5), (-1, 0.5)))):
            assert TextEncoder(model, CPU).encode(IDS, blend).dtype == torch.bfloat16

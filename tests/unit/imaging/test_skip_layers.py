"""Skip layer guidance: two predictions for less than two forwards, and images moved away from the second."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from PIL import Image
from torch import Tensor, nn

from tests.numerics import ONE_FORWARD, assert_close_relative
from tests.unit.imaging.test_forward import LEVELS, by_diffusers, noise_of, prompt_of
from zcore.checkpoint.geometry import LatentSize
from zcore.checkpoint.layer_counts import LayerCounts
from zcore.errors import InvalidRequest
from zcore.imaging.network.vae import VaeCodec
from zcore.imaging.network.velocity_model import Sample, VelocityModel
from zcore.imaging.pipeline import Inputs, ZImagePipeline
from zcore.imaging.sampling.guidance import is_skipping
from zcore.request import GenerationRequest, Pass, SkipLayerGuidance

CPU = torch.device("cpu")
SLG = SkipLayerGuidance(scale=2.0, layers=(1, 2), start=0.0, stop=1.0)
BATCH = [(LatentSize(10, 14), 41, 2), (LatentSize(16, 16), 20, 5)]


@pytest.fixture
def reference(tiny_folder: Path) -> ZImageTransformer2DModel:
    return ZImageTransformer2DModel.from_pretrained(tiny_folder / "transformer").eval().requires_grad_(False)


@pytest.mark.parametrize("skipped", [(0,), (3,), (2, 1), (1, 3), (0, 1, 2, 3)])
def test_both_predictions_are_those_of_two_full_forwards(
    reference: ZImageTransformer2DModel, skipped: tuple[int, ...]
) -> None:
    samples = [Sample(prompt_of(reference, words, seed), size, LEVELS) for seed, (size, words, _) in enumerate(BATCH)]
    latents = [noise_of(size, seed) for seed, (size, _, _) in enumerate(BATCH)]
    steps = [step for _, _, step in BATCH]
    ours = VelocityModel(reference, CPU, torch.float32)

    whole, without = ours.velocities_skipping(ours.plans(samples), latents, steps, skipped)

    def expected() -> list[Tensor]:
        levels = [LEVELS[step] for step in steps]
        return by_diffusers(reference, latents, levels, [sample.prompt_embeds for sample in samples])

    assert all(torch.equal(one, other) for one, other in zip(whole, expected(), strict=True))
    reference.layers = nn.ModuleList(block for index, block in enumerate(reference.layers) if index not in skipped)
    assert all(torch.equal(one, other) for one, other in zip(without, expected(), strict=True))
    assert not torch.allclose(whole[0], without[0], atol=1e-3)


def test_blocks_before_the_first_skipped_one_run_once_and_skipped_ones_only_for_one(
    reference: ZImageTransformer2DModel,
) -> None:
    ran: list[int] = []
    for index, block in enumerate(reference.layers):
        block.feed_forward.register_forward_hook(lambda *_, index=index: ran.append(index))
    ours = VelocityModel(reference, CPU, torch.float32)
    size = LatentSize(8, 8)
    ours.velocities_skipping([ours.plan(prompt_of(reference, 5), size, LEVELS)], [noise_of(size)], [0], [2])
    assert ran == [0, 1, 2, 3, 3]


@pytest.mark.parametrize(
    ("start", "stop", "steps", "active"),
    [(0.05, 0.5, 8, [1, 2, 3]), (0.05, 0.5, 9, [1, 2, 3, 4]), (0.01, 0.2, 8, [1]), (0, 1, 4, [0, 1, 2, 3]),
     (0.9, 1.0, 8, []), (0.25, 0.5, 8, [2, 3])],
)  # fmt: skip
def test_a_step_is_guided_within_the_window(start: float, stop: float, steps: int, active: list[int]) -> None:
    slg = SkipLayerGuidance(start=start, stop=stop)
    assert [step for step in range(steps) if is_skipping(slg, step, steps)] == active
    assert not is_skipping(SkipLayerGuidance(scale=0, start=0, stop=1), 0, 8)


# Images


@pytest.fixture
def latents_of(tiny_pipeline: ZImagePipeline, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Generate, and return the latents that reach the decoder."""
    seen: list[Tensor] = []
    decode = VaeCodec.decode_latents

    def recording(coder: VaeCodec, latents: Tensor, tiled: bool) -> Image.Image:
        seen.append(latents.clone())
        return decode(coder, latents, tiled)

    monkeypatch.setattr(VaeCodec, "decode_latents", recording)

    def generated(inputs: Inputs | None = None, **fields: Any) -> Tensor:
        said: dict[str, Any] = {"width": 64, "height": 80, "steps": 2, "seed": 3, **fields}
        tiny_pipeline.generate(GenerationRequest(prompt="a red circle", **said), inputs=inputs)
        return seen.pop()

    return generated


def scaled(scale: float) -> SkipLayerGuidance:
    return SkipLayerGuidance(scale=scale, layers=(1, 2), start=0.0, stop=1.0)


@pytest.mark.numeric
def test_its_difference_is_added_by_scale_independently_of_other_guidance(latents_of: Any) -> None:
    """With one step the latents are linear in both scales."""
    plain, once, thrice = (latents_of(steps=1, slg=slg) for slg in (None, scaled(1.0), scaled(3.0)))
    guided, both = (latents_of(steps=1, guidance_scale=2.0, slg=slg) for slg in (None, scaled(1.0)))
    assert float((once - plain).std()) > 0.01
    # Differences of latents: their rounding errors are relative to the latents, not to the differences.
    magnitude = float(plain.abs().max())
    assert_close_relative(thrice - plain, 3 * (once - plain), roundings=ONE_FORWARD, magnitude=magnitude)
    assert not torch.allclose(guided, plain, atol=1e-3)
    assert_close_relative(both - guided, once - plain, roundings=ONE_FORWARD, gain=5, magnitude=magnitude)


def test_it_works_with_passes_input_images_and_several_images(latents_of: Any) -> None:
    image = Inputs(image=Image.new("RGB", (64, 80), "teal"))
    for fields in (
        {"inputs": image, "image": "given:a"},
        {"passes": (Pass(scale=0.9), Pass(scale=1.0))},
        {"n": 2},
        {"guidance_scale": 1.5, "cfg_normalization": 1.0},
    ):
        assert not torch.allclose(latents_of(**fields), latents_of(**fields, slg=SLG), atol=1e-3)


def test_a_pass_overrides_the_request(latents_of: Any) -> None:
    def passes(*slg: SkipLayerGuidance | None) -> tuple[Pass, ...]:
        return tuple(Pass(scale=1.0, slg=one) for one in slg)

    everywhere = latents_of(passes=passes(None, None), slg=SLG)
    assert torch.equal(latents_of(passes=passes(SLG, SLG)), everywhere)
    assert torch.equal(latents_of(passes=passes(scaled(0), scaled(0)), slg=SLG), latents_of(passes=passes(None, None)))
    assert not torch.equal(latents_of(passes=passes(None, scaled(0)), slg=SLG), everywhere)


def test_it_leaves_nothing_behind(latents_of: Any) -> None:
    before = latents_of()
    latents_of(slg=SLG)
    assert torch.equal(latents_of(), before)
    assert torch.equal(latents_of(slg=SkipLayerGuidance(layers=(1,), start=0.9, stop=1.0)), before)


def test_a_layer_that_the_checkpoint_lacks_is_refused_by_name(tiny_pipeline: ZImagePipeline, tiny_folder: Path) -> None:
    request = GenerationRequest(
        prompt="a", width=64, height=64, slg=SkipLayerGuidance(layers=(1, 4)),
        passes=(Pass(scale=1.0, slg=SLG), Pass(scale=1.0, slg=SkipLayerGuidance())),
    )  # fmt: skip
    with pytest.raises(InvalidRequest) as refusal:
        tiny_pipeline.generate(request)
    assert LayerCounts.of_checkpoint(tiny_folder).transformer == 4
    assert {fault.pointer: fault.detail for fault in refusal.value.errors} == {
        "/slg/layers": "names layer 4; this checkpoint has layers 0 to 3",
        "/passes/1/slg/layers": "names layer 12; this checkpoint has layers 0 to 3",
    }

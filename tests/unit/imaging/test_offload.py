"""Weights that rest come to compute, change nothing by that, and are gone afterwards."""

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tests.unit.imaging.lora_layouts import LAYOUTS
from zcore.errors import CheckpointError, GenerationCanceled
from zcore.imaging.inputs import Inputs
from zcore.imaging.model.loader import Offload, Placement, load_text_encoder, load_transformer
from zcore.imaging.model.lora import changeable
from zcore.imaging.model.offload import OffloadedNetwork, StreamedBlocks, brought, ready_to_leave
from zcore.imaging.model.quantization import Quantization, pack, packable
from zcore.imaging.model.transformer import VelocityModel
from zcore.imaging.pipeline import Progress, ZImagePipeline
from zcore.imaging.prompt_encoder import PromptEncoder
from zcore.imaging.text.encoder import LayerBlend, TextEncoder
from zcore.request import Dype, GenerationRequest, LoraUse, Pass, SkipLayerGuidance

CPU = torch.device("cpu")
ELSEWHERE = torch.device("meta")
"""A device that is not the CPU and that every machine has. What computes there has no values, but a place."""


def tensors_of(network: nn.Module) -> Iterator[Tensor]:
    yield from network.parameters()
    yield from network.buffers()


def places_of(network: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in tensors_of(network)}


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval().requires_grad_(False)


def test_a_network_leaves_when_it_is_told_to_and_comes_back_when_it_is_needed() -> None:
    network = OffloadedNetwork(layers(), ELSEWHERE, "network")
    assert network.rest() is False
    for _ in range(2):
        assert places_of(network.present()) == {"meta"}
        assert network.present() is network.present()
        assert network.rest() is True
        assert network.rest() is False


def test_a_network_that_is_there_from_the_start_can_leave_too() -> None:
    loaded = layers()
    network = OffloadedNetwork(loaded, ELSEWHERE, "none")
    assert network.present() is loaded
    assert network.rest() is True
    assert network.rest() is False
    assert places_of(network.present()) == {"meta"}


def test_on_a_cpu_nothing_becomes_free() -> None:
    loaded = layers()
    there = OffloadedNetwork(loaded, CPU, "none")
    assert there.rest() is False
    assert there.present() is loaded
    coming = OffloadedNetwork(layers(), CPU, "network")
    coming.present()
    assert coming.rest() is False


def test_the_text_encoder_of_a_prompt_encoder_can_be_told_to_rest(tiny_folder: Path) -> None:
    encoder = PromptEncoder.from_pretrained(tiny_folder, torch_dtype=torch.float32, device="cpu")
    before = encoder.encode("a red circle").embeds
    assert encoder.rest() is False
    assert torch.equal(encoder.encode("a red circle").embeds, before)


UNITS: tuple[Offload, ...] = ("network", "block")
FIELDS: dict[str, dict[str, Any]] = {
    "plain, two pictures": {"n": 2},
    "guided": {"guidance_scale": 3.0, "negative_prompt": "blur"},
    "skipping layers": {"slg": SkipLayerGuidance(layers=(1, 3), start=0.0, stop=1.0)},
    "two passes, stretched": {
        "passes": (Pass(scale=0.5), Pass(scale=1.0, strength=0.5)),
        "dype": Dype(base_resolution=64),
    },
    "from a picture": {"image": "given:picture", "strength": 0.6},
}


def loaded(folder: Path, unit: Offload, **options: Any) -> ZImagePipeline:
    given = {} if unit == "none" else {"cpu_offload": True, "cpu_offload_unit": unit}
    devices = {"encoder_device": "cpu", "dit_device": "cpu", "vae_device": "cpu"}
    return ZImagePipeline.from_pretrained(folder, torch_dtype="float32", **devices, **given, **options)


def painted(pipeline: ZImagePipeline, inputs: Inputs | None = None, **fields: Any) -> list[bytes]:
    request = GenerationRequest(prompt="a fox", width=64, height=96, steps=3, seed=5, **fields)
    return [one.image.tobytes() for one in pipeline.generate(request, inputs=inputs).images]


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize("unit", UNITS)
def test_pictures_are_those_of_weights_that_stay(
    tiny_folder: Path, tiny_pipeline: ZImagePipeline, unit: Offload, fields: dict[str, Any]
) -> None:
    picture = Image.fromarray(np.arange(64 * 96 * 3, dtype=np.uint8).reshape(96, 64, 3))
    inputs = Inputs(image=picture) if "image" in fields else None
    assert painted(loaded(tiny_folder, unit), inputs, **fields) == painted(tiny_pipeline, inputs, **fields)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("layout", ["diffusers", "dora"])
def test_loras_come_beside_what_comes_and_leave_nothing(
    tiny_folder: Path, tiny_pipeline: ZImagePipeline, unit: Offload, layout: str
) -> None:
    network = load_transformer(tiny_folder, Placement(CPU, torch.float32))
    name = next(one for one in LAYOUTS if layout in one.lower())
    content = LAYOUTS[name](changeable(network)).content
    offloading = loaded(tiny_folder, unit)

    def with_lora(pipeline: ZImagePipeline) -> list[bytes]:
        inputs = Inputs(loras={"style": pipeline.load_lora(content, "style")})
        return painted(pipeline, inputs, loras=(LoraUse(name="style", scale=1.0),))

    plain = painted(tiny_pipeline)
    assert with_lora(offloading) == with_lora(tiny_pipeline) != plain
    assert painted(offloading) == plain


def test_at_most_two_blocks_are_there_in_whatever_order_they_are_asked_for(tiny_folder: Path) -> None:
    resting = load_transformer(tiny_folder, Placement(CPU, torch.float32)).layers
    blocks = StreamedBlocks(resting, CPU)
    alive = weakref.WeakSet[nn.Module]()
    most = 0
    for index in (0, 1, 2, 3, 0, 0, 2, 1, 3, 3, 2):
        for one in (blocks._given, blocks._next):
            if one is not None:
                alive.add(one.block)
        given = blocks[index]
        alive.add(given)
        for name, weight in given.named_parameters():
            own = resting[index].get_parameter(name)
            assert torch.equal(weight, own)
            assert weight.data_ptr() != own.data_ptr()
        del given, weight, own
        gc.collect()
        most = max(most, len(alive))
    assert most == 2


def test_what_came_leaves_with_the_generation_whatever_ends_it(
    tiny_folder: Path, tiny_pipeline: ZImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = loaded(tiny_folder, "network")
    come: list[weakref.ref[VelocityModel]] = []
    bring = VelocityModel.brought

    def watched(model: VelocityModel) -> VelocityModel:
        brought = bring(model)
        come.append(weakref.ref(brought))
        return brought

    def stop(progress: Progress) -> None:
        if progress.step == 2:
            raise GenerationCanceled("enough")

    monkeypatch.setattr(VelocityModel, "brought", watched)
    request = GenerationRequest(prompt="a fox", width=64, height=96, steps=3)
    with pytest.raises(GenerationCanceled):
        pipeline.generate(request, stop)
    pictures = painted(pipeline)
    gc.collect()
    assert len(come) == 2
    assert [one() for one in come] == [None, None]
    assert pictures == painted(tiny_pipeline)


@pytest.mark.parametrize("unit", UNITS)
def test_the_text_encoder_comes_by_the_same_units(tiny_folder: Path, unit: Offload) -> None:
    def states(offload: Offload) -> list[Tensor]:
        model = load_text_encoder(tiny_folder, Placement(CPU, torch.float32))
        encoder = TextEncoder(model, CPU, offload)
        return [encoder.encode(range(5, 30), LayerBlend(blend)) for blend in (((-2, 1.0),), ((-4, 0.5), (-1, 0.5)))]

    with torch.inference_mode():
        assert all(torch.equal(*pair) for pair in zip(states(unit), states("none"), strict=True))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("kind", ["8bit", "fp8", "4bit"])
def test_packed_weights_come_as_they_are(tiny_folder: Path, unit: Offload, kind: Quantization) -> None:
    bits: dict[str, Any] = {"dit_quantization": kind, "encoder_quantization": kind}
    assert painted(loaded(tiny_folder, unit, **bits)) == painted(loaded(tiny_folder, "none", **bits))


@pytest.mark.parametrize("kind", ["none", "8bit", "fp8", "4bit"])
def test_everything_of_a_network_comes_but_the_blocks_that_are_awaited(tiny_folder: Path, kind: Quantization) -> None:
    network = load_transformer(tiny_folder, Placement(CPU, torch.float32))
    for name in packable(network):
        pack(network, name, kind)
    resting = ready_to_leave(network, ELSEWHERE)
    assert places_of(brought(resting, ELSEWHERE, "network")) == {"meta"}
    streaming = brought(resting, ELSEWHERE, "block", but=["adaLN_modulation"])
    assert places_of(streaming) == {"meta"}
    block: Any = streaming.layers[1]
    assert places_of(block.attention) == places_of(block.feed_forward) == {"meta"}
    assert places_of(block.adaLN_modulation) == {"cpu"}
    assert places_of(resting) == {"cpu"}


def test_a_compiled_forward_cannot_take_blocks_one_at_a_time(tiny_folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^compile: .* offload by `network`, or do not compile"):
        loaded(tiny_folder, "block", compile=True)


@pytest.mark.gpu
def test_on_a_card_blocks_that_come_on_their_own_stream_give_the_same_picture(demo_folder: Path) -> None:
    card: dict[str, Any] = {"encoder_device": "cuda", "dit_device": "cuda", "vae_device": "cuda"}
    request = GenerationRequest(prompt="a red star", width=256, height=256, steps=8, seed=5)

    def picture(**options: Any) -> bytes:
        pipeline = ZImagePipeline.from_pretrained(demo_folder, torch_dtype="float32", **card, **options)
        return [pipeline.generate(request).images[0].image.tobytes() for _ in range(3)][-1]

    resident = picture()
    for unit in UNITS:
        assert picture(cpu_offload=True, cpu_offload_unit=unit) == resident

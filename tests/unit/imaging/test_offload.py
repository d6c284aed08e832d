"""Weights that rest come to compute, change nothing by that, and are gone afterwards."""

import gc
import weakref
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
from gguf import GGMLQuantizationType
from PIL import Image
from torch import Tensor, nn

from tests.unit.imaging.lora_layouts import LAYOUTS
from tests.unit.imaging.memory_budget import MemoryBudget
from zcore.errors import CheckpointError, GenerationCanceled, OutOfMemory
from zcore.imaging.inputs import Inputs
from zcore.imaging.model import loader
from zcore.imaging.model.loader import Offload, Placement, load_text_encoder, load_transformer
from zcore.imaging.model.lora import changeable
from zcore.imaging.model.offload import OffloadedNetwork, StreamedBlocks, _PageLocked, brought, moved, ready_to_leave
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


@pytest.fixture
def as_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU nothing would be offloaded; here its copies show what a card's would."""
    monkeypatch.setattr(loader, "useful_offload", lambda _device, offload: offload)


def loaded(folder: Path, unit: Offload, **options: Any) -> ZImagePipeline:
    given = {} if unit == "none" else {"cpu_offload": True, "cpu_offload_unit": unit}
    devices = {"encoder_device": "cpu", "dit_device": "cpu", "vae_device": "cpu"}
    return ZImagePipeline.from_pretrained(folder, torch_dtype="float32", **devices, **given, **options)


def painted(pipeline: ZImagePipeline, inputs: Inputs | None = None, **fields: Any) -> list[bytes]:
    request = GenerationRequest(prompt="a fox", width=64, height=96, steps=3, seed=5, **fields)
    return [one.image.tobytes() for one in pipeline.generate(request, inputs=inputs).images]


@pytest.mark.usefixtures("as_on_a_card")
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize("unit", UNITS)
def test_pictures_are_those_of_weights_that_stay(
    tiny_folder: Path, tiny_pipeline: ZImagePipeline, unit: Offload, fields: dict[str, Any]
) -> None:
    picture = Image.fromarray(np.arange(64 * 96 * 3, dtype=np.uint8).reshape(96, 64, 3))
    inputs = Inputs(image=picture) if "image" in fields else None
    assert painted(loaded(tiny_folder, unit), inputs, **fields) == painted(tiny_pipeline, inputs, **fields)


@pytest.mark.usefixtures("as_on_a_card")
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


def test_not_even_while_one_comes_are_there_more_than_two(tiny_folder: Path) -> None:
    resting = load_transformer(tiny_folder, Placement(CPU, torch.float32)).layers
    blocks = StreamedBlocks(resting, CPU)
    with MemoryBudget(float("inf")) as came:
        for index in (0, 1, 2, 3, 0, 2, 1, 3, 3, 2):
            blocks[index]
    assert came.peak_bytes == 2 * sum(tensor.nbytes for tensor in tensors_of(resting[0]))


@pytest.mark.usefixtures("as_on_a_card")
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


@pytest.mark.usefixtures("as_on_a_card")
@pytest.mark.parametrize("unit", UNITS)
def test_memory_that_runs_out_at_any_time_leaves_nothing_behind(
    tiny_folder: Path, tiny_pipeline: ZImagePipeline, unit: Offload
) -> None:
    """Of weights that rest the copies count, as on a card."""
    pipeline, expected = loaded(tiny_folder, unit), painted(tiny_pipeline)
    with MemoryBudget(float("inf")) as whole:
        painted(pipeline)
    gc.collect()
    assert whole.alive_bytes == 0
    ended: set[str] = set()
    for share in (0.1, 0.4, 0.6, 0.8, 0.9):
        told: list[Progress] = []
        request = GenerationRequest(prompt="a fox", width=64, height=96, steps=3, seed=5)
        with pytest.raises(OutOfMemory), MemoryBudget(whole.peak_bytes * share) as short:
            pipeline.generate(request, told.append)
        gc.collect()
        assert short.alive_bytes == 0
        ended.add(told[-1].phase)
        assert painted(pipeline) == expected
    assert len(ended) > 1


def test_no_weight_comes_twice(tiny_folder: Path) -> None:
    network = load_transformer(tiny_folder, Placement(CPU, torch.float32))
    whole = sum(tensor.nbytes for tensor in tensors_of(network))
    model = VelocityModel(network, CPU, torch.float32, offload="network")
    with MemoryBudget(float("inf")) as came:
        model.brought()
    assert came.peak_bytes == whole


def test_weights_rest_side_by_side_in_pieces_of_locked_memory() -> None:
    """Only where they lie is looked at here: locking needs a card."""
    tensors = [
        torch.randn(3, 5), torch.tensor(2.5), torch.arange(7, dtype=torch.int8), torch.randn(100, 9).bfloat16(),
        torch.randn(4, 6).t(), torch.randn(0, 4), torch.randn(2, 2, dtype=torch.float64),
    ]  # fmt: skip
    piece = _PageLocked(piece_bytes=1024, locked=False)
    copies = [piece.copy_of(tensor) for tensor in tensors]
    assert all(torch.equal(*pair) and pair[0].dtype == pair[1].dtype for pair in zip(copies, tensors, strict=True))
    places = sorted((one.data_ptr(), one.data_ptr() + one.nbytes) for one in copies if one.nbytes)
    assert all(end <= start for (_, end), (start, _) in pairwise(places))
    assert len({one.untyped_storage().data_ptr() for one in copies if one.nbytes}) == 3


def test_gguf_comes_packed() -> None:
    numbers = gguf.quantize(torch.randn(4, 32).numpy(), GGMLQuantizationType.Q8_0)
    packed = GGUFParameter(torch.tensor(numbers), quant_type=GGMLQuantizationType.Q8_0)
    layer = GGUFLinear(32, 4, compute_dtype=torch.float32)
    layer.weight = packed
    came: Any = moved(layer, CPU)
    assert came.weight.data_ptr() != packed.data_ptr()
    assert came.weight.quant_type == GGMLQuantizationType.Q8_0
    x = torch.randn(2, 32)
    assert torch.equal(came(x), layer(x))
    assert places_of(moved(layer, ELSEWHERE)) == {"meta"}


@pytest.mark.parametrize("unit", UNITS)
def test_the_text_encoder_comes_by_the_same_units(tiny_folder: Path, unit: Offload) -> None:
    def states(offload: Offload) -> list[Tensor]:
        model = load_text_encoder(tiny_folder, Placement(CPU, torch.float32))
        encoder = TextEncoder(model, CPU, offload)
        return [encoder.encode(range(5, 30), LayerBlend(blend)) for blend in (((-2, 1.0),), ((-4, 0.5), (-1, 0.5)))]

    with torch.inference_mode():
        assert all(torch.equal(*pair) for pair in zip(states(unit), states("none"), strict=True))


@pytest.mark.usefixtures("as_on_a_card")
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


@pytest.mark.usefixtures("as_on_a_card")
def test_a_compiled_forward_cannot_take_blocks_one_at_a_time(tiny_folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^compile: .* offload by `network`, or do not compile"):
        loaded(tiny_folder, "block", compile=True)


def test_on_a_cpu_weights_rest_where_they_compute(tiny_folder: Path) -> None:
    pipeline = loaded(tiny_folder, "network")
    assert pipeline._model.brought() is pipeline._model


def test_where_the_system_locks_no_memory_weights_rest_in_ordinary_memory() -> None:
    keep = _PageLocked(piece_bytes=64)
    tensors = [torch.arange(5.0), torch.arange(40, dtype=torch.uint8), torch.tensor(3, dtype=torch.bfloat16)]
    kept = [keep.copy_of(one) for one in tensors]
    assert all(torch.equal(*pair) for pair in zip(kept, tensors, strict=True))


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

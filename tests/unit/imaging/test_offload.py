"""Offloaded weights are copied to compute, the results are the same, and the copies are freed afterwards."""

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
from zcore.choices import Offload, Quantization
from zcore.errors import CheckpointError, GenerationCanceled, OutOfMemory
from zcore.imaging.generation_inputs import Inputs
from zcore.imaging.lora.adapters import changeable
from zcore.imaging.network.velocity_model import VelocityModel
from zcore.imaging.pipeline import Progress, ZImagePipeline
from zcore.imaging.prompt_encoder import PromptEncoder
from zcore.imaging.text.text_encoder import LayerBlend, TextEncoder
from zcore.imaging.weights import loader
from zcore.imaging.weights.loader import Placement, load_text_encoder, load_transformer
from zcore.imaging.weights.offload import (
    OffloadedNetwork,
    StreamedBlocks,
    _PageLockedMemory,
    copy_to_device,
    load_to_device,
    prepare_offload,
)
from zcore.imaging.weights.quantization import pack, packable
from zcore.request import Dype, GenerationRequest, LoraUse, Pass, SkipLayerGuidance

CPU = torch.device("cpu")
ELSEWHERE = torch.device("meta")
"""A device other than the CPU that every machine has. Its tensors have a device but no values."""


def tensors_of(network: nn.Module) -> Iterator[Tensor]:
    yield from network.parameters()
    yield from network.buffers()


def devices_of(network: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in tensors_of(network)}


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval().requires_grad_(False)


def test_an_unloaded_network_returns_when_it_is_needed() -> None:
    network = OffloadedNetwork(layers(), ELSEWHERE, "network")
    assert network.unload() is False
    for _ in range(2):
        assert devices_of(network.on_device()) == {"meta"}
        assert network.on_device() is network.on_device()
        assert network.unload() is True
        assert network.unload() is False


def test_a_network_that_starts_on_the_device_can_be_unloaded_too() -> None:
    loaded = layers()
    network = OffloadedNetwork(loaded, ELSEWHERE, "none")
    assert network.on_device() is loaded
    assert network.unload() is True
    assert network.unload() is False
    assert devices_of(network.on_device()) == {"meta"}


def test_on_a_cpu_unloading_frees_nothing() -> None:
    loaded = layers()
    resident = OffloadedNetwork(loaded, CPU, "none")
    assert resident.unload() is False
    assert resident.on_device() is loaded
    offloaded = OffloadedNetwork(layers(), CPU, "network")
    offloaded.on_device()
    assert offloaded.unload() is False


def test_a_prompt_encoder_can_unload_its_text_encoder(tiny_folder: Path) -> None:
    encoder = PromptEncoder.from_pretrained(tiny_folder, torch_dtype=torch.float32, device="cpu")
    before = encoder.encode("a red circle").embeds
    assert encoder.unload() is False
    assert torch.equal(encoder.encode("a red circle").embeds, before)


UNITS: tuple[Offload, ...] = ("network", "block")
FIELDS: dict[str, dict[str, Any]] = {
    "plain, two images": {"n": 2},
    "guided": {"guidance_scale": 3.0, "negative_prompt": "blur"},
    "skipping layers": {"slg": SkipLayerGuidance(layers=(1, 3), start=0.0, stop=1.0)},
    "two passes, stretched": {
        "passes": (Pass(scale=0.5), Pass(scale=1.0, strength=0.5)),
        "dype": Dype(base_resolution=64),
    },
    "from an image": {"image": "given:image", "strength": 0.6},
}


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offload even on a CPU, whose copies behave like those on a GPU."""
    monkeypatch.setattr(loader, "useful_offload", lambda _device, offload: offload)


def loaded(folder: Path, unit: Offload, **options: Any) -> ZImagePipeline:
    given = {} if unit == "none" else {"cpu_offload": True, "cpu_offload_unit": unit}
    devices = {"encoder_device": "cpu", "dit_device": "cpu", "vae_device": "cpu"}
    return ZImagePipeline.from_pretrained(folder, torch_dtype="float32", **devices, **given, **options)


def generated(pipeline: ZImagePipeline, inputs: Inputs | None = None, **fields: Any) -> list[bytes]:
    request = GenerationRequest(prompt="a fox", width=64, height=96, steps=3, seed=5, **fields)
    return [one.image.tobytes() for one in pipeline.generate(request, inputs=inputs).images]


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize("unit", UNITS)
def test_images_equal_those_without_offloading(
    tiny_folder: Path, tiny_pipeline: ZImagePipeline, unit: Offload, fields: dict[str, Any]
) -> None:
    image = Image.fromarray(np.arange(64 * 96 * 3, dtype=np.uint8).reshape(96, 64, 3))
    inputs = Inputs(image=image) if "image" in fields else None
    assert generated(loaded(tiny_folder, unit), inputs, **fields) == generated(tiny_pipeline, inputs, **fields)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("layout", ["diffusers", "dora"])
def test_loras_work_with_offloading_and_leave_no_state(
    tiny_folder: Path, tiny_pipeline: ZImagePipeline, unit: Offload, layout: str
) -> None:
    network = load_transformer(tiny_folder, Placement(CPU, torch.float32))
    name = next(one for one in LAYOUTS if layout in one.lower())
    content = LAYOUTS[name](changeable(network)).content
    offloading = loaded(tiny_folder, unit)

    def with_lora(pipeline: ZImagePipeline) -> list[bytes]:
        inputs = Inputs(loras={"style": pipeline.load_lora(content, "style")})
        return generated(pipeline, inputs, loras=(LoraUse(name="style", scale=1.0),))

    plain = generated(tiny_pipeline)
    assert with_lora(offloading) == with_lora(tiny_pipeline) != plain
    assert generated(offloading) == plain


def test_at_most_two_blocks_are_on_the_device_in_any_order_of_access(tiny_folder: Path) -> None:
    stored = load_transformer(tiny_folder, Placement(CPU, torch.float32)).layers
    blocks = StreamedBlocks(stored, CPU)
    alive = weakref.WeakSet[nn.Module]()
    most = 0
    for index in (0, 1, 2, 3, 0, 0, 2, 1, 3, 3, 2):
        for one in (blocks._current, blocks._next):
            if one is not None:
                alive.add(one.block)
        block = blocks[index]
        alive.add(block)
        for name, weight in block.named_parameters():
            own = stored[index].get_parameter(name)
            assert torch.equal(weight, own)
            assert weight.data_ptr() != own.data_ptr()
        del block, weight, own
        gc.collect()
        most = max(most, len(alive))
    assert most == 2


def test_even_during_copying_at_most_two_blocks_are_on_the_device(tiny_folder: Path) -> None:
    stored = load_transformer(tiny_folder, Placement(CPU, torch.float32)).layers
    blocks = StreamedBlocks(stored, CPU)
    with MemoryBudget(float("inf")) as copied:
        for index in (0, 1, 2, 3, 0, 2, 1, 3, 3, 2):
            blocks[index]
    assert copied.peak_bytes == 2 * sum(tensor.nbytes for tensor in tensors_of(stored[0]))


@pytest.mark.usefixtures("as_on_a_gpu")
def test_copies_are_freed_with_the_generation_however_it_ends(
    tiny_folder: Path, tiny_pipeline: ZImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = loaded(tiny_folder, "network")
    copies: list[weakref.ref[VelocityModel]] = []
    on_device = VelocityModel.on_device

    def watched(model: VelocityModel) -> VelocityModel:
        copied = on_device(model)
        copies.append(weakref.ref(copied))
        return copied

    def stop(progress: Progress) -> None:
        if progress.step == 2:
            raise GenerationCanceled("enough")

    monkeypatch.setattr(VelocityModel, "on_device", watched)
    request = GenerationRequest(prompt="a fox", width=64, height=96, steps=3)
    with pytest.raises(GenerationCanceled):
        pipeline.generate(request, stop)
    images = generated(pipeline)
    gc.collect()
    assert len(copies) == 2
    assert [copy() for copy in copies] == [None, None]
    assert images == generated(tiny_pipeline)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("unit", UNITS)
def test_running_out_of_memory_at_any_time_leaves_nothing_behind(
    tiny_folder: Path, tiny_pipeline: ZImagePipeline, unit: Offload
) -> None:
    """Copies of offloaded weights count, as on a GPU."""
    pipeline, expected = loaded(tiny_folder, unit), generated(tiny_pipeline)
    with MemoryBudget(float("inf")) as whole:
        generated(pipeline)
    gc.collect()
    assert whole.alive_bytes == 0
    ended: set[str] = set()
    for share in (0.1, 0.4, 0.6, 0.8, 0.9):
        reported: list[Progress] = []
        request = GenerationRequest(prompt="a fox", width=64, height=96, steps=3, seed=5)
        with pytest.raises(OutOfMemory), MemoryBudget(whole.peak_bytes * share) as short:
            pipeline.generate(request, reported.append)
        gc.collect()
        assert short.alive_bytes == 0
        ended.add(reported[-1].phase)
        assert generated(pipeline) == expected
    assert len(ended) > 1


def test_no_weight_is_copied_twice(tiny_folder: Path) -> None:
    network = load_transformer(tiny_folder, Placement(CPU, torch.float32))
    whole = sum(tensor.nbytes for tensor in tensors_of(network))
    model = VelocityModel(network, CPU, torch.float32, offload="network")
    with MemoryBudget(float("inf")) as copied:
        model.on_device()
    assert copied.peak_bytes == whole


def test_weights_share_pieces_of_page_locked_memory() -> None:
    """This checks only addresses: page-locking needs a GPU."""
    tensors = [
        torch.randn(3, 5), torch.tensor(2.5), torch.arange(7, dtype=torch.int8), torch.randn(100, 9).bfloat16(),
        torch.randn(4, 6).t(), torch.randn(0, 4), torch.randn(2, 2, dtype=torch.float64),
    ]  # fmt: skip
    piece = _PageLockedMemory(piece_bytes=1024, locked=False)
    copies = [piece.copy_of(tensor) for tensor in tensors]
    assert all(torch.equal(*pair) and pair[0].dtype == pair[1].dtype for pair in zip(copies, tensors, strict=True))
    ranges = sorted((one.data_ptr(), one.data_ptr() + one.nbytes) for one in copies if one.nbytes)
    assert all(end <= start for (_, end), (start, _) in pairwise(ranges))
    assert len({one.untyped_storage().data_ptr() for one in copies if one.nbytes}) == 3


def test_gguf_weights_are_copied_without_dequantizing() -> None:
    numbers = gguf.quantize(torch.randn(4, 32).numpy(), GGMLQuantizationType.Q8_0)
    packed = GGUFParameter(torch.tensor(numbers), quant_type=GGMLQuantizationType.Q8_0)
    layer = GGUFLinear(32, 4, compute_dtype=torch.float32)
    layer.weight = packed
    copied: Any = copy_to_device(layer, CPU)
    assert copied.weight.data_ptr() != packed.data_ptr()
    assert copied.weight.quant_type == GGMLQuantizationType.Q8_0
    x = torch.randn(2, 32)
    assert torch.equal(copied(x), layer(x))
    assert devices_of(copy_to_device(layer, ELSEWHERE)) == {"meta"}


@pytest.mark.parametrize("unit", UNITS)
def test_the_text_encoder_supports_the_same_units(tiny_folder: Path, unit: Offload) -> None:
    def states(offload: Offload) -> list[Tensor]:
        model = load_text_encoder(tiny_folder, Placement(CPU, torch.float32))
        encoder = TextEncoder(model, CPU, offload)
        return [encoder.encode(range(5, 30), LayerBlend(blend)) for blend in (((-2, 1.0),), ((-4, 0.5), (-1, 0.5)))]

    with torch.inference_mode():
        assert all(torch.equal(*pair) for pair in zip(states(unit), states("none"), strict=True))


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("kind", ["8bit", "fp8", "4bit"])
def test_quantized_weights_give_the_same_images(tiny_folder: Path, unit: Offload, kind: Quantization) -> None:
    kinds: dict[str, Any] = {"dit_quantization": kind, "encoder_quantization": kind}
    assert generated(loaded(tiny_folder, unit, **kinds)) == generated(loaded(tiny_folder, "none", **kinds))


@pytest.mark.parametrize("kind", ["none", "8bit", "fp8", "4bit"])
def test_everything_is_copied_except_the_streamed_blocks(tiny_folder: Path, kind: Quantization) -> None:
    network = load_transformer(tiny_folder, Placement(CPU, torch.float32))
    for name in packable(network):
        pack(network, name, kind)
    stored = prepare_offload(network, ELSEWHERE)
    assert devices_of(load_to_device(stored, ELSEWHERE, "network")) == {"meta"}
    streaming = load_to_device(stored, ELSEWHERE, "block", leave_out=["adaLN_modulation"])
    assert devices_of(streaming) == {"meta"}
    block: Any = streaming.layers[1]
    assert devices_of(block.attention) == devices_of(block.feed_forward) == {"meta"}
    assert devices_of(block.adaLN_modulation) == {"cpu"}
    assert devices_of(stored) == {"cpu"}


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_compiled_forward_does_not_support_streamed_blocks(tiny_folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^compile: .* set cpu_offload_unit to `network`"):
        loaded(tiny_folder, "block", compile=True)


def test_on_a_cpu_nothing_is_offloaded(tiny_folder: Path) -> None:
    pipeline = loaded(tiny_folder, "network")
    assert pipeline._engine._model.on_device() is pipeline._engine._model


def test_without_page_locked_memory_weights_are_stored_in_ordinary_memory() -> None:
    memory = _PageLockedMemory(piece_bytes=64)
    tensors = [torch.arange(5.0), torch.arange(40, dtype=torch.uint8), torch.tensor(3, dtype=torch.bfloat16)]
    copies = [memory.copy_of(tensor) for tensor in tensors]
    assert all(torch.equal(*pair) for pair in zip(copies, tensors, strict=True))


@pytest.mark.gpu
def test_on_a_gpu_blocks_copied_on_a_separate_stream_give_the_same_image(demo_folder: Path) -> None:
    devices: dict[str, Any] = {"encoder_device": "cuda", "dit_device": "cuda", "vae_device": "cuda"}
    request = GenerationRequest(prompt="a red star", width=256, height=256, steps=8, seed=5)

    def generate(**options: Any) -> bytes:
        pipeline = ZImagePipeline.from_pretrained(demo_folder, torch_dtype="float32", **devices, **options)
        return [pipeline.generate(request).images[0].image.tobytes() for _ in range(3)][-1]

    resident = generate()
    for unit in UNITS:
        assert generate(cpu_offload=True, cpu_offload_unit=unit) == resident

"""The memory estimate matches the real architecture, and its conclusions hold for GPUs of every size."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.tracing import META, LiveStorages, traced
from zcore.checkpoint.geometry import latent_size
from zcore.choices import Quantization
from zcore.imaging import memory_estimate
from zcore.imaging.memory_estimate import Component, GenerationShape, Part, estimate, largest_square
from zcore.imaging.network.tiling import Tiling
from zcore.imaging.network.vae import VaeCodec
from zcore.imaging.network.velocity_model import Sample, VelocityModel
from zcore.imaging.text.text_encoder import LayerBlend, TextEncoder
from zcore.imaging.weights.loader import Networks, Placement, build_meta
from zcore.imaging.weights.quantization import pack, packable

GIB = 1024**3
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def networks(layout_dir: Path) -> Networks:
    """The real architecture: names and shapes without weights."""
    return build_meta(layout_dir)


def as_published(**changed: Part) -> dict[Component, Part]:
    """Place all on one GPU in bfloat16, the VAE in float32 as its configuration requires; replace some parts."""
    parts = {
        "text_encoder": Part(Placement(CUDA, BFLOAT16)),
        "transformer": Part(Placement(CUDA, BFLOAT16)),
        "vae": Part(Placement(CUDA, FLOAT32)),
    }
    return {**parts, **changed}  # pyright: ignore[reportReturnType]


def of_type(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convert a network to another dtype, without diffusers' own `to`, which warns about it."""
    return nn.Module.to(network, dtype)


def step_of(networks: Networks, shape: GenerationShape, dtype: torch.dtype) -> LiveStorages:
    """Trace the storages of a step, including its plans."""
    model = VelocityModel(of_type(networks.transformer, dtype), META, dtype)
    size = latent_size(shape.width_px, shape.height_px)
    sigmas = [1 - step / shape.steps for step in range(shape.steps + 1)]
    with traced() as storages:
        prompt = torch.empty(shape.prompt_tokens, model.prompt_width, dtype=dtype, device=META)
        samples = [Sample(prompt, size, sigmas)] * shape.batch_size
        plans = [model.plans(samples) for _ in range(2 if shape.guided else 1)]
        latents = [torch.empty(16, size.height, size.width, device=META) for _ in samples]
        velocities = [model.velocities(each, latents, [0] * len(samples)) for each in plans]
    assert len(velocities) == len(plans)
    return storages


def close(formula: int, traced_bytes: int) -> bool:
    """Whether a formula is within a tenth, and at most 2 % too low."""
    return 0.98 * traced_bytes <= formula <= 1.10 * traced_bytes


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32])
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("side", [512, 1024, 2048])
def test_a_step_needs_the_memory_of_the_formula(
    networks: Networks, side: int, batch_size: int, dtype: torch.dtype
) -> None:
    shape = GenerationShape(side, side, prompt_tokens=101, batch_size=batch_size)
    estimated = memory_estimate.denoising_tensors_bytes(networks.transformer, shape, dtype.itemsize)
    assert close(estimated, step_of(networks, shape, dtype).peak_bytes)


@pytest.mark.parametrize(
    "changed",
    [{"guided": True}, {"prompt_tokens": 1504}, {"height_px": 576}, {"steps": 50}, {"guided": True, "batch_size": 4}],
    ids=str,
)
def test_the_formula_holds_with_guidance_long_prompts_other_sizes_and_more_steps(
    networks: Networks, changed: dict[str, Any]
) -> None:
    shape = replace(GenerationShape(prompt_tokens=101), **changed)
    estimated = memory_estimate.denoising_tensors_bytes(networks.transformer, shape, BFLOAT16.itemsize)
    assert close(estimated, step_of(networks, shape, BFLOAT16).peak_bytes)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32])
@pytest.mark.parametrize("side", [512, 1024, 2048])
def test_the_vae_needs_the_memory_of_the_formulas(networks: Networks, side: int, dtype: torch.dtype) -> None:
    codec = VaeCodec(of_type(networks.vae, dtype), META, dtype)
    with traced() as decoding:
        codec._decoded(torch.empty(16, side // 8, side // 8, device=META))
    with traced() as encoding:
        codec._encoded(torch.empty(3, side, side, dtype=torch.uint8, device=META))
    size = (networks.vae, side, side, dtype.itemsize)
    assert close(memory_estimate.decoding_tensors_bytes(*size), decoding.peak_bytes)
    assert close(memory_estimate.image_encoding_tensors_bytes(*size), encoding.peak_bytes)


@pytest.mark.parametrize("tokens", [101, 512, 1504])
def test_the_text_encoder_needs_the_memory_of_the_formula(networks: Networks, tokens: int) -> None:
    encoder = TextEncoder(of_type(networks.text_encoder, BFLOAT16), META)
    with traced() as storages:
        encoder.encode([0] * tokens, LayerBlend(((-2, 1.0),)))
    assert close(memory_estimate.encoding_tensors_bytes(networks.text_encoder, tokens, 2), storages.peak_bytes)


def test_attention_is_counted_without_a_matrix_of_every_token_by_every_token(networks: Networks) -> None:
    kinds = step_of(networks, GenerationShape(prompt_tokens=101), BFLOAT16).at_peak
    assert {shape for _, shape, _ in kinds if shape.count(4224) > 1} == set()
    with torch.no_grad(), LiveStorages() as storages:  # without the fused kernel there is such a matrix
        one = torch.empty(1, 30, 4224, 128, device=META)
        torch.nn.functional.scaled_dot_product_attention(one, one, one)
    assert storages.peak_bytes > 30 * 4224**2


def test_a_trace_does_not_count_freed_tensors() -> None:
    with traced() as storages:
        for _ in range(3):
            torch.empty(1000, device=META)
    assert (storages.peak_bytes, storages.live_bytes) == (4000, 0)


def test_weights_have_the_published_sizes(networks: Networks) -> None:
    assert memory_estimate.weights_bytes(networks.transformer, BFLOAT16) == 6_154_908_736 * 2  # 12.31 GB
    assert memory_estimate.weights_bytes(networks.text_encoder, BFLOAT16) == 8_044_936_192
    assert memory_estimate.weights_bytes(networks.vae, BFLOAT16) == 83_819_683 * 2  # 168 MB


@pytest.mark.parametrize("kind", ["8bit", "fp8", "4bit"])
def test_the_size_of_quantized_weights_is_that_of_really_quantized_ones(kind: Quantization) -> None:
    """One block of a small network is really quantized."""
    network = nn.Module()
    network.layers = nn.ModuleList([nn.Module()])
    network.layers[0].attention = nn.ModuleDict({"to_q": nn.Linear(256, 128, bias=False)})
    network.other = nn.Linear(16, 8, bias=False)
    network = network.to(BFLOAT16).requires_grad_(False)
    estimated = memory_estimate.weights_bytes(network, BFLOAT16, kind)
    for name in packable(network):
        pack(network, name, kind)
    assert estimated == sum(map(stored_bytes, [*network.parameters(), *network.buffers()]))


def stored_bytes(weight: torch.Tensor) -> int:
    """Return the bytes of a plain tensor, or of the tensors inside one of torchao's."""
    if not hasattr(weight, "__tensor_flatten__") or type(weight) in (torch.Tensor, nn.Parameter):
        return weight.nbytes
    inner: Any = weight.__tensor_flatten__()[0]
    return sum(getattr(weight, name).nbytes for name in inner)


def test_a_quantized_file_counts_with_its_own_size(networks: Networks) -> None:
    parts = as_published(transformer=Part(Placement(CUDA, BFLOAT16), packed_file_bytes=5 * GIB))
    found = {one.component: one for one in estimate(networks, parts, GenerationShape()).weights}
    assert found["transformer"].size_bytes == 5 * GIB
    assert found["transformer"].unpacked_bytes == 10240 * 3840 * 2


def test_the_peak_is_that_of_the_widest_phase_and_all_parts_are_counted(networks: Networks) -> None:
    (gpu,) = estimate(networks, as_published(), GenerationShape(), {"cuda": 80 * GIB}).devices
    weights = 12_309_817_472 + 8_044_936_192 + 83_819_683 * 4
    assert [(phase.phase, phase.weights_bytes) for phase in gpu.phases] == [
        ("encode", weights),
        ("denoise", weights),
        ("decode", weights),
    ]
    assert gpu.widest.phase == "decode"
    assert gpu.peak_bytes == weights + 4 * 1024 * 1024 * 256 * 4 + memory_estimate.RUNTIME_BYTES


def test_a_text_encoder_on_the_cpu_needs_no_gpu_memory(networks: Networks) -> None:
    parts = as_published(text_encoder=Part(Placement(CPU, BFLOAT16)))
    cpu, gpu = estimate(networks, parts, GenerationShape()).devices
    assert (cpu.device, gpu.device) == ("cpu", "cuda")
    assert gpu.phases[0].working_bytes == 0
    assert {phase.weights_bytes for phase in gpu.phases} == {12_309_817_472 + 83_819_683 * 4}
    assert cpu.widest.phase == "encode"


def test_offloaded_networks_are_on_the_device_one_at_a_time(networks: Networks) -> None:
    parts = as_published(
        text_encoder=Part(Placement(CUDA, BFLOAT16, offload="network")),
        transformer=Part(Placement(CUDA, BFLOAT16, offload="network")),
    )
    found = {one.device: one for one in estimate(networks, parts, GenerationShape()).devices}
    vae = 83_819_683 * 4
    assert [one.weights_bytes - vae for one in found["cuda"].phases] == [8_044_936_192, 12_309_817_472, 12_309_817_472]
    assert {one.weights_bytes for one in found["cpu"].phases} == {8_044_936_192 + 12_309_817_472}


def test_of_a_transformer_that_comes_by_blocks_two_are_on_the_card(networks: Networks) -> None:
    parts = as_published(transformer=Part(Placement(CUDA, BFLOAT16, offload="block")))
    found = {one.component: one for one in estimate(networks, parts, GenerationShape()).weights}["transformer"]
    blocks = [
        sum(weight.numel() for name, weight in block.named_parameters() if not name.startswith("adaLN")) * 2
        for block in networks.transformer.layers  # pyright: ignore
    ]
    assert found.present_bytes == found.size_bytes - sum(blocks) + 2 * blocks[0]
    assert found.present_bytes < 0.2 * found.size_bytes


def test_the_vae_uses_tiles_if_one_piece_does_not_fit_and_on_request(networks: Networks) -> None:
    roomy, tight = ({"cuda": gib * GIB} for gib in (80, 24))
    assert not estimate(networks, as_published(), GenerationShape(), roomy).in_tiles
    assert estimate(networks, as_published(), replace(GenerationShape(), tiled=True), roomy).in_tiles
    found = estimate(networks, as_published(), GenerationShape(2048, 2048, tiling=Tiling(256, 64)), tight)
    assert found.in_tiles
    assert found.devices[0].phases[-1].working_bytes == 4 * 256 * 256 * 256 * 4


def test_a_gpu_that_is_too_small_lacks_exactly_the_missing_bytes(networks: Networks) -> None:
    (short,) = estimate(networks, as_published(), GenerationShape(), {"cuda": 16 * GIB}).devices
    assert short.missing_bytes > 0
    enough = estimate(networks, as_published(), GenerationShape(), {"cuda": 16 * GIB + short.missing_bytes})
    assert enough.fits
    assert not estimate(networks, as_published(), GenerationShape(), {"cuda": short.missing_bytes + 16 * GIB - 1}).fits


def test_the_largest_square_fits_and_the_next_does_not(networks: Networks) -> None:
    gpu = {"cuda": 24 * GIB}
    side = largest_square(networks, as_published(), GenerationShape(), gpu)
    assert side is not None
    assert 1024 <= side < 8192
    assert estimate(networks, as_published(), GenerationShape(side, side), gpu).fits
    assert not estimate(networks, as_published(), GenerationShape(side + 16, side + 16), gpu).fits
    assert largest_square(networks, as_published(), GenerationShape(), {"cuda": 16 * GIB}) is None
    assert largest_square(networks, as_published(), GenerationShape(), {"cuda": 1000 * GIB}) == 8192


def test_cuda_and_cuda_0_are_one_device(networks: Networks) -> None:
    parts = as_published(vae=Part(Placement(torch.device("cuda:0"), FLOAT32)))
    assert [one.device for one in estimate(networks, parts, GenerationShape()).devices] == ["cuda"]

"""The estimate of memory is what the real architecture takes, and what follows from it for cards of every size."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.tracing import META, LiveStorages, traced
from zcore.imaging.geometry import latent_size
from zcore.imaging.model import memory
from zcore.imaging.model.loader import Networks, Placement, build_meta
from zcore.imaging.model.memory import Component, Painting, Part, estimate, largest_square
from zcore.imaging.model.quantization import Quantization, pack, packable
from zcore.imaging.model.tiling import Tiling
from zcore.imaging.model.transformer import Sample, VelocityModel
from zcore.imaging.model.vae import PictureCoder
from zcore.imaging.text.encoder import LayerBlend, TextEncoder

GIB = 1024**3
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def networks(layout_dir: Path) -> Networks:
    """The real architecture, names and shapes."""
    return build_meta(layout_dir)


def as_published(**changed: Part) -> dict[Component, Part]:
    """All on one card in bfloat16, the VAE in float32 as its configuration demands; with these parts instead."""
    parts = {
        "text_encoder": Part(Placement(CUDA, BFLOAT16)),
        "transformer": Part(Placement(CUDA, BFLOAT16)),
        "vae": Part(Placement(CUDA, FLOAT32)),
    }
    return {**parts, **changed}  # pyright: ignore[reportReturnType]


def of_type(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The network in another arithmetic. diffusers wonders aloud about that, so its own `to` is not asked."""
    return nn.Module.to(network, dtype)


def step_of(networks: Networks, painting: Painting, dtype: torch.dtype) -> LiveStorages:
    """What a step holds, with everything that was planned before it."""
    model = VelocityModel(of_type(networks.transformer, dtype), META, dtype)
    size = latent_size(painting.width_px, painting.height_px)
    sigmas = [1 - step / painting.steps for step in range(painting.steps + 1)]
    with traced() as storages:
        prompt = torch.empty(painting.prompt_tokens, model.prompt_width, dtype=dtype, device=META)
        samples = [Sample(prompt, size, sigmas)] * painting.batch_size
        plans = [model.plans(samples) for _ in range(2 if painting.guided else 1)]
        latents = [torch.empty(16, size.height, size.width, device=META) for _ in samples]
        velocities = [model.velocities(each, latents, [0] * len(samples)) for each in plans]
    assert len(velocities) == len(plans)
    return storages


def close(formula: int, traced_bytes: int) -> bool:
    """Within a tenth, and hardly ever too little."""
    return 0.98 * traced_bytes <= formula <= 1.10 * traced_bytes


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32])
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("side", [512, 1024, 2048])
def test_a_step_takes_what_the_formula_says(networks: Networks, side: int, batch_size: int, dtype: torch.dtype) -> None:
    painting = Painting(side, side, prompt_tokens=101, batch_size=batch_size)
    said = memory.denoising_tensors_bytes(networks.transformer, painting, dtype.itemsize)
    assert close(said, step_of(networks, painting, dtype).peak_bytes)


@pytest.mark.parametrize(
    "changed",
    [{"guided": True}, {"prompt_tokens": 1504}, {"height_px": 576}, {"steps": 50}, {"guided": True, "batch_size": 4}],
    ids=str,
)
def test_so_it_does_with_guidance_long_prompts_other_sizes_and_more_steps(
    networks: Networks, changed: dict[str, Any]
) -> None:
    painting = replace(Painting(prompt_tokens=101), **changed)
    said = memory.denoising_tensors_bytes(networks.transformer, painting, BFLOAT16.itemsize)
    assert close(said, step_of(networks, painting, BFLOAT16).peak_bytes)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32])
@pytest.mark.parametrize("side", [512, 1024, 2048])
def test_the_vae_takes_what_the_formulas_say(networks: Networks, side: int, dtype: torch.dtype) -> None:
    coder = PictureCoder(of_type(networks.vae, dtype), META, dtype)
    with traced() as decoding:
        coder._decoded(torch.empty(16, side // 8, side // 8, device=META))
    with traced() as encoding:
        coder._encoded(torch.empty(3, side, side, dtype=torch.uint8, device=META))
    size = (networks.vae, side, side, dtype.itemsize)
    assert close(memory.decoding_tensors_bytes(*size), decoding.peak_bytes)
    assert close(memory.picture_encoding_tensors_bytes(*size), encoding.peak_bytes)


@pytest.mark.parametrize("tokens", [101, 512, 1504])
def test_the_text_encoder_takes_what_the_formula_says(networks: Networks, tokens: int) -> None:
    encoder = TextEncoder(of_type(networks.text_encoder, BFLOAT16), META)
    with traced() as storages:
        encoder.encode([0] * tokens, LayerBlend(((-2, 1.0),)))
    assert close(memory.encoding_tensors_bytes(networks.text_encoder, tokens, 2), storages.peak_bytes)


def test_attention_is_counted_without_a_matrix_of_every_token_by_every_token(networks: Networks) -> None:
    kinds = step_of(networks, Painting(prompt_tokens=101), BFLOAT16).at_peak
    assert {shape for _, shape, _ in kinds if shape.count(4224) > 1} == set()
    with torch.no_grad(), LiveStorages() as storages:  # without the fused kernel there is one
        one = torch.empty(1, 30, 4224, 128, device=META)
        torch.nn.functional.scaled_dot_product_attention(one, one, one)
    assert storages.peak_bytes > 30 * 4224**2


def test_a_trace_forgets_what_is_gone() -> None:
    with traced() as storages:
        for _ in range(3):
            torch.empty(1000, device=META)
    assert (storages.peak_bytes, storages.live_bytes) == (4000, 0)


def test_weights_are_as_large_as_published(networks: Networks) -> None:
    assert memory.weights_bytes(networks.transformer, BFLOAT16) == 6_154_908_736 * 2  # 12.31 GB
    assert memory.weights_bytes(networks.text_encoder, BFLOAT16) == 8_044_936_192
    assert memory.weights_bytes(networks.vae, BFLOAT16) == 83_819_683 * 2  # 168 MB


@pytest.mark.parametrize("kind", ["8bit", "fp8", "4bit"])
def test_packed_weights_are_as_large_as_what_packs_them_makes(kind: Quantization) -> None:
    """One block of a small network, really packed."""
    network = nn.Module()
    network.layers = nn.ModuleList([nn.Module()])
    network.layers[0].attention = nn.ModuleDict({"to_q": nn.Linear(256, 128, bias=False)})
    network.other = nn.Linear(16, 8, bias=False)
    network = network.to(BFLOAT16).requires_grad_(False)
    said = memory.weights_bytes(network, BFLOAT16, kind)
    for name in packable(network):
        pack(network, name, kind)
    assert said == sum(map(stored_bytes, [*network.parameters(), *network.buffers()]))


def stored_bytes(weight: torch.Tensor) -> int:
    """Of a plain tensor its own bytes; of torchao's those of the tensors inside."""
    if not hasattr(weight, "__tensor_flatten__") or type(weight) in (torch.Tensor, nn.Parameter):
        return weight.nbytes
    inner: Any = weight.__tensor_flatten__()[0]
    return sum(getattr(weight, name).nbytes for name in inner)


def test_a_packed_file_counts_as_it_is(networks: Networks) -> None:
    parts = as_published(transformer=Part(Placement(CUDA, BFLOAT16), packed_file_bytes=5 * GIB))
    found = {one.component: one for one in estimate(networks, parts, Painting()).weights}
    assert found["transformer"].size_bytes == 5 * GIB
    assert found["transformer"].unpacked_bytes == 10240 * 3840 * 2


def test_the_peak_is_that_of_the_widest_phase_and_all_of_it_is_accounted_for(networks: Networks) -> None:
    (card,) = estimate(networks, as_published(), Painting(), {"cuda": 80 * GIB}).devices
    weights = 12_309_817_472 + 8_044_936_192 + 83_819_683 * 4
    assert [(phase.phase, phase.weights_bytes) for phase in card.phases] == [
        ("encode", weights),
        ("denoise", weights),
        ("decode", weights),
    ]
    assert card.widest.phase == "decode"
    assert card.peak_bytes == weights + 4 * 1024 * 1024 * 256 * 4 + memory.RUNTIME_BYTES


def test_a_text_encoder_on_the_cpu_is_no_burden_to_the_card(networks: Networks) -> None:
    parts = as_published(text_encoder=Part(Placement(CPU, BFLOAT16)))
    cpu, card = estimate(networks, parts, Painting()).devices
    assert (cpu.device, card.device) == ("cpu", "cuda")
    assert card.phases[0].working_bytes == 0
    assert {phase.weights_bytes for phase in card.phases} == {12_309_817_472 + 83_819_683 * 4}
    assert cpu.widest.phase == "encode"


def test_networks_that_rest_take_turns_on_the_card(networks: Networks) -> None:
    parts = as_published(
        text_encoder=Part(Placement(CUDA, BFLOAT16, offload="network")),
        transformer=Part(Placement(CUDA, BFLOAT16, offload="network")),
    )
    found = {one.device: one for one in estimate(networks, parts, Painting()).devices}
    vae = 83_819_683 * 4
    assert [one.weights_bytes - vae for one in found["cuda"].phases] == [8_044_936_192, 12_309_817_472, 12_309_817_472]
    assert {one.weights_bytes for one in found["cpu"].phases} == {8_044_936_192 + 12_309_817_472}


def test_of_a_transformer_that_comes_by_blocks_two_are_on_the_card(networks: Networks) -> None:
    parts = as_published(transformer=Part(Placement(CUDA, BFLOAT16, offload="block")))
    found = {one.component: one for one in estimate(networks, parts, Painting()).weights}["transformer"]
    blocks = [
        sum(weight.numel() for name, weight in block.named_parameters() if not name.startswith("adaLN")) * 2
        for block in networks.transformer.layers  # pyright: ignore
    ]
    assert found.present_bytes == found.size_bytes - sum(blocks) + 2 * blocks[0]
    assert found.present_bytes < 0.2 * found.size_bytes


def test_the_vae_goes_in_tiles_where_one_piece_would_not_fit_and_where_it_is_told_to(networks: Networks) -> None:
    roomy, tight = ({"cuda": gib * GIB} for gib in (80, 24))
    assert not estimate(networks, as_published(), Painting(), roomy).in_tiles
    assert estimate(networks, as_published(), replace(Painting(), tiled=True), roomy).in_tiles
    found = estimate(networks, as_published(), Painting(2048, 2048, tiling=Tiling(256, 64)), tight)
    assert found.in_tiles
    assert found.devices[0].phases[-1].working_bytes == 4 * 256 * 256 * 256 * 4


def test_a_card_that_is_too_small_lacks_what_is_said_to_be_missing(networks: Networks) -> None:
    (short,) = estimate(networks, as_published(), Painting(), {"cuda": 16 * GIB}).devices
    assert short.missing_bytes > 0
    enough = estimate(networks, as_published(), Painting(), {"cuda": 16 * GIB + short.missing_bytes})
    assert enough.fits
    assert not estimate(networks, as_published(), Painting(), {"cuda": short.missing_bytes + 16 * GIB - 1}).fits


def test_the_largest_square_fits_and_the_next_does_not(networks: Networks) -> None:
    card = {"cuda": 24 * GIB}
    side = largest_square(networks, as_published(), Painting(), card)
    assert side is not None
    assert 1024 <= side < 8192
    assert estimate(networks, as_published(), Painting(side, side), card).fits
    assert not estimate(networks, as_published(), Painting(side + 16, side + 16), card).fits
    assert largest_square(networks, as_published(), Painting(), {"cuda": 16 * GIB}) is None
    assert largest_square(networks, as_published(), Painting(), {"cuda": 1000 * GIB}) == 8192


def test_cuda_and_cuda_0_are_one_device(networks: Networks) -> None:
    parts = as_published(vae=Part(Placement(torch.device("cuda:0"), FLOAT32)))
    assert [one.device for one in estimate(networks, parts, Painting()).devices] == ["cuda"]

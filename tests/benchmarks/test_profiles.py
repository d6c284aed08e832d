"""How much of a card's memory does each profile take, and how close is the estimate?

Method: the published architecture (ZIMAGE_LAYOUT_DIR) with small random weights, loaded with the quantization and
offloading of each profile. A prompt of 512 tokens is encoded, one step of 1024x1024 is computed and decoded. The peak
of torch's allocator and of the whole device are compared with the estimate of `zimage doctor`. It needs 40 GB of the
CPU's memory. Without a card the same code runs on the demo checkpoint with the profile `demo`, and only the estimate is
reported.
"""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.benchmarks.report import report
from zcore.checkpoint.geometry import LatentSize
from zcore.demo import CHECKPOINT
from zcore.imaging.from_settings import memory_parts
from zcore.imaging.memory_estimate import GenerationShape, device_name, estimate
from zcore.imaging.network.tiling import Tiling
from zcore.imaging.network.vae import VaeCodec
from zcore.imaging.network.velocity_model import VelocityModel
from zcore.imaging.text.text_encoder import LayerBlend, TextEncoder
from zcore.imaging.weights.loader import Networks, Placement, build_meta
from zcore.imaging.weights.quantization import pack, packable
from zcore.settings import load_settings

pytestmark = pytest.mark.benchmarks

ON_CARD = torch.cuda.is_available()
SIDE_PX, TOKENS = (1024, 512) if ON_CARD else (128, 40)


@pytest.mark.parametrize("profile", ["rtx4090", "rtx4080", "rtx3060", "rtx3060ti"] if ON_CARD else ["demo"])
def test_peak_memory(layout_dir: Path, profile: str) -> None:
    folder = layout_dir if ON_CARD else CHECKPOINT
    settings = load_settings({}, {"profile": profile, "model_path": str(folder)})
    parts, networks = memory_parts(settings, folder), build_meta(folder)
    placements = {name: part.placement for name, part in parts.items()}
    shape = GenerationShape(width_px=SIDE_PX, height_px=SIDE_PX, prompt_tokens=TOKENS)
    card = placements["transformer"].device
    estimated = next(one for one in estimate(networks, parts, shape).devices if one.device == device_name(card))
    if ON_CARD:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    used_mb = _used_mb(networks, placements)
    report(
        f"peak memory of the profile {profile} at {SIDE_PX} px",
        device=torch.cuda.get_device_name() if ON_CARD else "cpu",
        estimate_mb=estimated.widest.total_bytes // 10**6,
        allocated_mb=torch.cuda.max_memory_allocated() // 10**6 if ON_CARD else None,
        used_of_device_mb=used_mb,
    )


def _used_mb(networks: Networks, placements: dict[str, Placement]) -> int | None:
    """Run a prompt, a step and a decoding; return the MB of the card in use, the allocator's cache included."""
    encoding, denoising, decoding = (placements[name] for name in ("text_encoder", "transformer", "vae"))
    encoder = TextEncoder(_random(networks.text_encoder, encoding), encoding.device, encoding.offload)
    model = VelocityModel(
        _random(networks.transformer, denoising), denoising.device, denoising.dtype, offload=denoising.offload
    )
    coder = VaeCodec(_random(networks.vae, decoding), decoding.device, decoding.dtype)
    size = LatentSize(SIDE_PX // 8, SIDE_PX // 8)
    with torch.inference_mode():
        embeds = encoder.encode(range(TOKENS), LayerBlend(((-2, 1.0),))).to(denoising.device, denoising.dtype)
        if encoding.offload != "none":
            encoder.unload()
        brought = model.on_device()
        latents = torch.randn(16, size.height, size.width, device=denoising.device)
        velocity = brought.velocity(brought.plan(embeds, size, [0.8, 0.0]), latents, 0)
        coder.decode_latents(velocity, None if coder.fits(SIDE_PX, SIDE_PX) else Tiling())
    if not ON_CARD:
        return None
    free, total = torch.cuda.mem_get_info()
    return (total - free) // 10**6


def _random(network: nn.Module, placement: Placement) -> nn.Module:
    """Return the network with random weights in the state in which the loader leaves them: packed, on their device."""
    buffers = dict(network.named_buffers())
    random = network.to_empty(device="cpu").to(placement.dtype).eval().requires_grad_(False)
    for name, buffer in buffers.items():
        random.get_buffer(name).copy_(buffer)
    for weight in random.parameters():
        weight.normal_(std=0.02)
    for name in packable(random):
        pack(random, name, placement.quantization)
    return random.to(placement.storage_device)

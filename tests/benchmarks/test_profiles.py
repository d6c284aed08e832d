"""How much of a card's memory does each profile take, and how near is the estimate?

Method: the published architecture (ZIMAGE_LAYOUT_DIR) with small random weights, loaded as a profile loads it: packed,
resting and coming as it says. A prompt of 512 tokens is encoded, a step of 1024x1024 is made and decoded; the peak of
torch's allocator and of the whole device, against `zimage doctor`'s estimate. It wants 40 GB of the CPU's memory.
Without a card the same code runs on the demo checkpoint by the profile `demo`, and only the estimate is told.
"""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.benchmarks.report import report
from zcore.demo import CHECKPOINT
from zcore.imaging.from_settings import memory_parts
from zcore.imaging.geometry import LatentSize
from zcore.imaging.model.loader import Networks, Placement, build_meta
from zcore.imaging.model.memory import Painting, device_name, estimate
from zcore.imaging.model.quantization import pack, packable
from zcore.imaging.model.tiling import Tiling
from zcore.imaging.model.transformer import VelocityModel
from zcore.imaging.model.vae import PictureCoder
from zcore.imaging.text.encoder import LayerBlend, TextEncoder
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
    painting = Painting(width_px=SIDE_PX, height_px=SIDE_PX, prompt_tokens=TOKENS)
    card = placements["transformer"].device
    told = next(one for one in estimate(networks, parts, painting).devices if one.device == device_name(card))
    if ON_CARD:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    used_mb = _painted(networks, placements)
    report(
        f"peak memory of the profile {profile} at {SIDE_PX} px",
        device=torch.cuda.get_device_name() if ON_CARD else "cpu",
        estimate_mb=told.widest.total_bytes // 10**6,
        allocated_mb=torch.cuda.max_memory_allocated() // 10**6 if ON_CARD else None,
        used_of_device_mb=used_mb,
    )


def _painted(networks: Networks, placements: dict[str, Placement]) -> int | None:
    """A prompt, a step and a picture; how much of the card was taken at the end, with all that the allocator keeps."""
    encoding, painting, decoding = (placements[name] for name in ("text_encoder", "transformer", "vae"))
    encoder = TextEncoder(_random(networks.text_encoder, encoding), encoding.device, encoding.offload)
    model = VelocityModel(
        _random(networks.transformer, painting), painting.device, painting.dtype, offload=painting.offload
    )
    coder = PictureCoder(_random(networks.vae, decoding), decoding.device, decoding.dtype)
    size = LatentSize(SIDE_PX // 8, SIDE_PX // 8)
    with torch.inference_mode():
        embeds = encoder.encode(range(TOKENS), LayerBlend(((-2, 1.0),))).to(painting.device, painting.dtype)
        if encoding.offload != "none":
            encoder.rest()
        brought = model.brought()
        latents = torch.randn(16, size.height, size.width, device=painting.device)
        velocity = brought.velocity(brought.plan(embeds, size, [0.8, 0.0]), latents, 0)
        coder.decode(velocity, None if coder.fits(SIDE_PX, SIDE_PX) else Tiling())
    if not ON_CARD:
        return None
    free, total = torch.cuda.mem_get_info()
    return (total - free) // 10**6


def _random(network: nn.Module, placement: Placement) -> nn.Module:
    """With weights as the loader would leave them: drawn in the CPU's memory, packed, moved to where they rest."""
    buffers = dict(network.named_buffers())
    drawn = network.to_empty(device="cpu").to(placement.dtype).eval().requires_grad_(False)
    for name, buffer in buffers.items():
        drawn.get_buffer(name).copy_(buffer)
    for weight in drawn.parameters():
        weight.normal_(std=0.02)
    for name in packable(drawn):
        pack(drawn, name, placement.quantization)
    return drawn.to(placement.rests_on)

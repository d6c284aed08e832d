"""What does it cost to copy the weights to the device for each forward?

Method: one step each of the transformer with random weights that stay on the device, are copied as a network, and are
streamed by block. Reported are milliseconds per forward, and on a CUDA device the peak of its memory. On a CUDA device
it is the published architecture in bfloat16 (ZIMAGE_LAYOUT_DIR names its configurations; 12 GB of the CPU's memory), at
512 and 1024 px; elsewhere the demo checkpoint in float32 at 128 and 256 px. There copying gains nothing, and the result
is the cost of the copies and of the Python around them.
"""

import time
from pathlib import Path
from statistics import median

import pytest
import torch
from torch import nn

from tests.benchmarks.report import report
from zcore.checkpoint.geometry import LatentSize
from zcore.choices import Offload
from zcore.demo import CHECKPOINT
from zcore.imaging.network.velocity_model import VelocityModel
from zcore.imaging.weights.loader import Placement, build_meta, load_transformer

pytestmark = pytest.mark.benchmarks

UNITS: tuple[Offload, ...] = ("none", "network", "block")
ROUNDS = 12


def test_streaming(layout_dir: Path) -> None:
    torch.set_num_threads(1)
    on_card = torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if on_card else (torch.device("cpu"), torch.float32)
    for side_px in (512, 1024) if on_card else (128, 256):
        size = LatentSize(side_px // 8, side_px // 8)
        milliseconds: dict[str, float] = {}
        peaks: dict[str, int] = {}
        for unit in UNITS:
            network = _random(layout_dir, dtype) if on_card else load_transformer(CHECKPOINT, Placement(device, dtype))
            network = network.to(device) if unit == "none" else network
            model = VelocityModel(network, device, dtype, offload=unit)
            milliseconds[unit], peaks[unit] = _measured(model, size, device)
            del model, network
        report(
            f"a forward of {side_px} px with resident weights, copied as a network and streamed by block",
            device=torch.cuda.get_device_name() if on_card else "cpu",
            ms=milliseconds,
            by_resident={unit: round(milliseconds[unit] / milliseconds["none"], 3) for unit in UNITS[1:]},
            **({"peak_mb": peaks} if on_card else {}),
        )


def _random(layout: Path, dtype: torch.dtype) -> nn.Module:
    """Return the published architecture in the CPU's memory, with small random weights."""
    network = build_meta(layout).transformer.to(dtype).to_empty(device="cpu").eval().requires_grad_(False)
    for weight in network.parameters():
        weight.normal_(std=0.02)
    return network


def _measured(model: VelocityModel, size: LatentSize, device: torch.device) -> tuple[float, int]:
    """Return the median milliseconds of a step, the copies included, and the peak memory in MB."""
    embeds = torch.randn(101, model.prompt_width, device=device).to(model._dtype)
    latents = torch.randn(16, size.height, size.width, device=device)
    taken: list[float] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with torch.inference_mode():
        for _ in range(ROUNDS):
            began = time.perf_counter()
            brought = model.on_device()
            brought.velocity(brought.plan(embeds, size, [0.8, 0.0]), latents, 0)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append((time.perf_counter() - began) * 1000)
            del brought
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return round(median(taken[2:]), 2), peak // 10**6

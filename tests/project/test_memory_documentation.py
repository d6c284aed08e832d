"""The table of what fits in docs/memory.md is the estimate for the shipped profiles."""

import re
from pathlib import Path

import torch

from zcore.imaging.from_settings import memory_parts
from zcore.imaging.memory_estimate import GenerationShape, estimate, largest_square
from zcore.imaging.network.tiling import Tiling
from zcore.imaging.weights.loader import build_meta
from zcore.settings import Settings, load_settings

PAGE = Path(__file__).resolve().parents[2] / "docs" / "memory.md"
CARDS = {"rtx4090": 24, "rtx4080": 16, "rtx3060": 12, "rtx3060ti": 8}
GIB = 1024**3


def shape(settings: Settings) -> GenerationShape:
    tiling = Tiling(settings.pytorch.tile_size, settings.pytorch.tile_overlap)
    return GenerationShape(tiled=settings.pytorch.tiled_vae, tiling=tiling)


def generated(layout_dir: Path) -> str:
    """Return the table as the page must show it."""
    networks = build_meta(layout_dir)
    rows = [
        "| profile | card | weights | denoise | decode | peak at 1024x1024 | largest square | of the CPU's memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, gib in CARDS.items():
        settings = load_settings({}, {"profile": name, "model_path": str(layout_dir)})
        parts, card = memory_parts(settings, layout_dir, torch_device), {"cuda": gib * GIB}
        found = estimate(networks, parts, shape(settings), card)
        assert found.fits, name
        devices = {device.device: device for device in found.devices}
        phases = {phase.phase: phase for phase in devices["cuda"].phases}
        side = largest_square(networks, parts, shape(settings), card)
        rest = f"{devices['cpu'].peak_bytes / GIB:.1f}" if "cpu" in devices else ""
        cells = [
            f"`{name}`",
            f"{gib}",
            f"{phases['denoise'].weights_bytes / GIB:.1f}",
            f"{phases['denoise'].working_bytes / GIB:.1f}",
            f"{phases['decode'].working_bytes / GIB:.1f}{' in tiles' if found.in_tiles else ''}",
            f"{devices['cuda'].peak_bytes / GIB:.1f}",
            f"{side} px",
            rest,
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def torch_device(name: str) -> torch.device:
    return torch.device("cuda" if name == "auto" else name)


def test_the_table_of_what_fits_is_the_estimate(layout_dir: Path) -> None:
    shown = re.search(r"<!-- what fits -->\n(.*?)\n?<!-- /what fits -->", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert shown is not None
    assert shown[1] == generated(layout_dir)

"""The table of what fits, in docs/memory.md, is what the estimate says of the shipped profiles."""

import re
from pathlib import Path

import torch

from zcore.imaging.from_settings import memory_parts
from zcore.imaging.model.loader import build_meta
from zcore.imaging.model.memory import Painting, estimate, largest_square
from zcore.imaging.model.tiling import Tiling
from zcore.settings import Settings, load_settings

PAGE = Path(__file__).resolve().parents[2] / "docs" / "memory.md"
CARDS = {"rtx4090": 24, "rtx4080": 16, "rtx3060": 12, "rtx3060ti": 8}
GIB = 1024**3


def painting(settings: Settings) -> Painting:
    tiling = Tiling(settings.pytorch.tile_size, settings.pytorch.tile_overlap)
    return Painting(tiled=settings.pytorch.tiled_vae, tiling=tiling)


def generated(layout_dir: Path) -> str:
    """The table as the page has to have it."""
    networks = build_meta(layout_dir)
    rows = [
        "| profile | card | weights | denoise | decode | peak at 1024x1024 | largest square | of the CPU's memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, gib in CARDS.items():
        settings = load_settings({}, {"profile": name, "model_path": str(layout_dir)})
        parts, card = memory_parts(settings, layout_dir, torch_device), {"cuda": gib * GIB}
        found = estimate(networks, parts, painting(settings), card)
        assert found.fits, name
        devices = {device.device: device for device in found.devices}
        phases = {phase.phase: phase for phase in devices["cuda"].phases}
        side = largest_square(networks, parts, painting(settings), card)
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


def test_the_table_of_what_fits_is_what_the_estimate_says(layout_dir: Path) -> None:
    shown = re.search(r"<!-- what fits -->\n(.*?)\n?<!-- /what fits -->", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert shown is not None
    assert shown[1] == generated(layout_dir)

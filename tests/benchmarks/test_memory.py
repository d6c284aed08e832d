"""How close is the estimate of working memory to what the real architecture holds?

Method: the code of a step, of the VAE and of the text encoder runs on tensors without data, and every storage is
followed (`tests/tracing.py`); the formula's bytes are divided by the traced peak. No clock and no card take part: what
kernels and an allocator take on top is not measured.
"""

from pathlib import Path

import pytest
import torch

from tests.benchmarks.report import report
from tests.tracing import META, traced
from tests.unit.imaging.test_memory import of_type, step_of
from zcore.imaging.model import memory
from zcore.imaging.model.loader import build_meta
from zcore.imaging.model.memory import Painting
from zcore.imaging.model.vae import PictureCoder
from zcore.imaging.text.encoder import LayerBlend, TextEncoder

pytestmark = pytest.mark.benchmarks


def test_formula_by_trace(layout_dir: Path) -> None:
    networks = build_meta(layout_dir)
    found: dict[str, dict[str, float]] = {}

    def note(name: str, formula: int, peak_bytes: int) -> None:
        found[name] = {"traced_mb": round(peak_bytes / 1e6, 1), "formula_by_trace": round(formula / peak_bytes, 4)}

    for side in (512, 1024, 2048):
        for batch_size in (1, 2):
            painting = Painting(side, side, prompt_tokens=101, batch_size=batch_size)
            said = memory.denoising_tensors_bytes(networks.transformer, painting, 2)
            note(f"step {side} px x {batch_size}", said, step_of(networks, painting, torch.bfloat16).peak_bytes)
        coder = PictureCoder(of_type(networks.vae, torch.float32), META, torch.float32)
        with traced() as decoding:
            coder._decoded(torch.empty(16, side // 8, side // 8, device=META))
        with traced() as encoding:
            coder._encoded(torch.empty(3, side, side, dtype=torch.uint8, device=META))
        size = (networks.vae, side, side, 4)
        note(f"decoding {side} px", memory.decoding_tensors_bytes(*size), decoding.peak_bytes)
        note(f"encoding {side} px", memory.picture_encoding_tensors_bytes(*size), encoding.peak_bytes)
    encoder = TextEncoder(of_type(networks.text_encoder, torch.bfloat16), META)
    for tokens in (101, 1504):
        with traced() as reading:
            encoder.encode([0] * tokens, LayerBlend(((-2, 1.0),)))
        said = memory.encoding_tensors_bytes(networks.text_encoder, tokens, 2)
        note(f"prompt of {tokens} tokens", said, reading.peak_bytes)
    report("working memory, formula by trace", **found)

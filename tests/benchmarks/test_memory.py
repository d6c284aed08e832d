"""How close is the estimate of working memory to the peak of the real architecture?

Method: the code of a step, of the VAE and of the text encoder runs on tensors without data, and every storage is
tracked (`tests/tracing.py`); the formula's bytes are divided by the traced peak. Time and cards play no part: what
kernels and an allocator take in addition is not measured.
"""

from pathlib import Path

import pytest
import torch

from tests.benchmarks.report import report
from tests.tracing import META, traced
from tests.unit.imaging.test_memory import of_type, step_of
from zcore.imaging import memory_estimate
from zcore.imaging.memory_estimate import GenerationShape
from zcore.imaging.network.vae import VaeCodec
from zcore.imaging.text.text_encoder import LayerBlend, TextEncoder
from zcore.imaging.weights.loader import build_meta

pytestmark = pytest.mark.benchmarks


def test_formula_by_trace(layout_dir: Path) -> None:
    networks = build_meta(layout_dir)
    found: dict[str, dict[str, float]] = {}

    def note(name: str, formula: int, peak_bytes: int) -> None:
        found[name] = {"traced_mb": round(peak_bytes / 1e6, 1), "formula_by_trace": round(formula / peak_bytes, 4)}

    for side in (512, 1024, 2048):
        for batch_size in (1, 2):
            shape = GenerationShape(side, side, prompt_tokens=101, batch_size=batch_size)
            formula = memory_estimate.denoising_tensors_bytes(networks.transformer, shape, 2)
            note(f"step {side} px x {batch_size}", formula, step_of(networks, shape, torch.bfloat16).peak_bytes)
        coder = VaeCodec(of_type(networks.vae, torch.float32), META, torch.float32)
        with traced() as decoding:
            coder._decoded(torch.empty(16, side // 8, side // 8, device=META))
        with traced() as encoding:
            coder._encoded(torch.empty(3, side, side, dtype=torch.uint8, device=META))
        size = (networks.vae, side, side, 4)
        note(f"decoding {side} px", memory_estimate.decoding_tensors_bytes(*size), decoding.peak_bytes)
        note(f"encoding {side} px", memory_estimate.image_encoding_tensors_bytes(*size), encoding.peak_bytes)
    encoder = TextEncoder(of_type(networks.text_encoder, torch.bfloat16), META)
    for tokens in (101, 1504):
        with traced() as reading:
            encoder.encode([0] * tokens, LayerBlend(((-2, 1.0),)))
        formula = memory_estimate.encoding_tensors_bytes(networks.text_encoder, tokens, 2)
        note(f"prompt of {tokens} tokens", formula, reading.peak_bytes)
    report("working memory, formula by trace", **found)

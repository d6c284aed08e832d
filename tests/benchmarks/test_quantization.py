"""What does quantization cost and save: bytes of the weights, and the error of an embedding, a forward and an image?

Method: the demo checkpoint in float32 on one thread, both networks quantized by each kind, GGUF of the transformer
alone. Bytes are those of all tensors of the two loaded networks. Errors are norms of differences divided by norms,
against plain float32 weights: of the embeddings of 20 held-out captions, and of the velocity at noise level 0.8 for
these (plain) embeddings at 128 px. The checker judges 60 held-out captions, generated with the same seeds. A forward's
time is a ratio to the plain one, measured alternately, median of 30.
"""

import random
import time
from statistics import median

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.benchmarks.report import report
from zcore.checkpoint.geometry import LatentSize
from zcore.choices import Quantization
from zcore.demo import CHECKPOINT
from zcore.demo.captions import caption
from zcore.demo.check import judge
from zcore.demo.vocabulary import Composition, Kind, random_composition
from zcore.imaging.network.velocity_model import Plan, VelocityModel
from zcore.imaging.pipeline import ZImagePipeline
from zcore.imaging.prompt_encoder import PromptEncoder
from zcore.imaging.weights.loader import Placement, load_text_encoder, load_transformer
from zcore.request import GenerationRequest

pytestmark = pytest.mark.benchmarks

CPU = torch.device("cpu")
SIZE = LatentSize(16, 16)
CAPTIONS = 20
TRIED = 60
KINDS: tuple[Kind, ...] = ("object", "count", "pair")


def bytes_of(network: nn.Module) -> int:
    """Return the bytes of all tensors, the parts of packed ones included."""
    found = 0
    for tensor in network.state_dict().values():
        parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]] if _is_packed(tensor) else [tensor]
        found += sum(part.numel() * part.element_size() for part in parts)
    return found


def held_out(count: int) -> list[tuple[Composition, str]]:
    rng = random.Random("quantization")
    scenes = [random_composition(rng, KINDS[index % 3], held_out=True) for index in range(count)]
    return [(one, caption(one, rng, True)) for one in scenes]


@pytest.mark.parametrize("kind", ["none", "8bit", "fp8", "4bit"])
def test_quantization(kind: Quantization) -> None:
    torch.set_num_threads(1)
    captions = held_out(max(CAPTIONS, TRIED))
    plain_encoder = PromptEncoder.from_pretrained(CHECKPOINT, torch_dtype="float32", device="cpu")
    encoder = PromptEncoder.from_pretrained(CHECKPOINT, torch_dtype="float32", device="cpu", quantization=kind)
    plain, packed = model("none"), model(kind)
    embedding_errors: list[float] = []
    velocity_errors: list[float] = []
    ratios: list[float] = []
    with torch.inference_mode():
        for index, (_, text) in enumerate(captions[:CAPTIONS]):
            embeds = plain_encoder.encode(text).embeds
            embedding_errors.append(error(encoder.encode(text).embeds, embeds))
            latents = torch.randn(16, 16, 16, generator=torch.Generator().manual_seed(index))
            plans = [one.plan(embeds, SIZE, [0.8, 0.0]) for one in (plain, packed)]
            velocity_errors.append(error(packed.velocity(plans[1], latents, 0), plain.velocity(plans[0], latents, 0)))
        ratios = [ratio((plain, plans[0]), (packed, plans[1]), latents) for _ in range(30)]
    pipeline = ZImagePipeline.from_pretrained(
        CHECKPOINT, torch_dtype="float32", dit_device="cpu", encoder_device="cpu", vae_device="cpu",
        dit_quantization=kind, encoder_quantization=kind,
    )  # fmt: skip
    right = 0
    for index, (wanted, text) in enumerate(captions[:TRIED]):
        request = GenerationRequest(prompt=text, width=128, height=128, seed=index)
        right += judge(wanted, np.asarray(pipeline.generate(request).images[0].image)).all_right
    placement = Placement(CPU, torch.float32, kind)
    report(
        f"quantization: {kind}",
        transformer_mb=round(bytes_of(load_transformer(CHECKPOINT, placement)) / 1e6, 2),
        text_encoder_mb=round(bytes_of(load_text_encoder(CHECKPOINT, placement)) / 1e6, 2),
        embedding_error=round(median(embedding_errors), 4),
        velocity_error=round(median(velocity_errors), 4),
        all_right=f"{right} of {TRIED}",
        forward_ratio=round(median(ratios), 2),
    )


def model(kind: Quantization) -> VelocityModel:
    return VelocityModel(load_transformer(CHECKPOINT, Placement(CPU, torch.float32, kind)), CPU, torch.float32)


def error(found: Tensor, true: Tensor) -> float:
    return float((found - true).norm() / true.norm())


def ratio(plain: tuple[VelocityModel, Plan], packed: tuple[VelocityModel, Plan], latents: Tensor) -> float:
    """Return the time of a packed forward divided by that of a plain one right before it."""
    moments = [time.perf_counter()]
    for network, plan in (plain, packed):
        network.velocity(plan, latents, 0)
        moments.append(time.perf_counter())
    return (moments[2] - moments[1]) / (moments[1] - moments[0])


def _is_packed(tensor: Tensor) -> bool:
    return hasattr(tensor, "__tensor_flatten__")

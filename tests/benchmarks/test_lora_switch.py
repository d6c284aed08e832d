"""How long does a worker take to switch between LoRAs, what does one cost per forward, and do images show the style?

Method: a switch is `VelocityModel.adapted`, from LoRAs that are on the device to a model that can make plans; three
sets of LoRAs alternate. On a CPU: the demo checkpoint in float32, one thread, with its two LoRAs; and the published
architecture without weights, with LoRAs of random numbers in bfloat16 on all attention and feed-forward matrices. That
is the whole work of a switch, because it does not read the model's weights. Reading and preparing a file are reported
separately: they are spent once while the LoRA stays cached. Styles are judged by the demo's checker, with LoRAs of the
request, on the captions that `zcore.demo.evaluate` generates.
"""

import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ZImageTransformer2DModel
from safetensors.torch import save
from torch import Tensor

from tests.benchmarks.report import report, spread
from zcore.checkpoint.geometry import latent_size
from zcore.demo.check import style_of
from zcore.demo.evaluate import draw_cases
from zcore.imaging.lora.adapters import LoraWeights, ScaledLora, adapted, bind, changeable
from zcore.imaging.lora.lora_file import parse_lora
from zcore.imaging.network.velocity_model import VelocityModel
from zcore.imaging.pipeline import ZImagePipeline
from zcore.imaging.sampling.schedule import sigmas

pytestmark = pytest.mark.benchmarks

DEMO = Path(__file__).resolve().parents[2] / "zcore" / "demo"
LEVELS = sigmas(8, 3.0)
CPU = torch.device("cpu")
PUBLISHED = {
    "dim": 3840,
    "n_heads": 30,
    "n_kv_heads": 30,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "cap_feat_dim": 2560,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
}


@pytest.fixture(autouse=True)
def no_gradients_and_one_thread() -> Iterator[None]:
    """Run everything as the worker does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


def test_switch_on_the_demo_checkpoint() -> None:
    network = ZImageTransformer2DModel.from_pretrained(DEMO / "checkpoint" / "transformer").eval()
    model = VelocityModel(network, CPU, torch.float32)
    contents = {style: (DEMO / "loras" / f"demo-{style}.safetensors").read_bytes() for style in ("night", "outline")}
    loads = [
        _ms(lambda content=content: model.lora(content, "style")) for content in contents.values() for _ in "12345"
    ]
    night, outline = (model.lora(content, style) for style, content in contents.items())
    sets = [[ScaledLora(night, 1.0)], [ScaledLora(outline, 0.7)], [ScaledLora(night, 0.5), ScaledLora(outline, 0.5)]]
    switches = [_ms(lambda one=one: model.adapted(one)) for one in islice(cycle(sets), 90)]
    latents, prompt = torch.randn(16, 16, 16), torch.randn(30, 128)
    pairs: list[tuple[float, float]] = []
    for _ in range(60):
        with_lora = model.adapted(sets[0])
        pairs.append((_forward_ms(with_lora, prompt, latents), _forward_ms(model, prompt, latents)))
    report(
        "a switch between LoRAs of the demo checkpoint, float32 on a CPU, and a forward of 128 px with one",
        switch_ms=spread(switches),
        load_ms=spread(loads),
        forward_over_plain=spread([one / other for one, other in pairs]),
    )


@pytest.mark.parametrize("rank", [16, 64])
def test_switch_of_the_published_size(rank: int) -> None:
    with torch.device("meta"):
        network = ZImageTransformer2DModel(**PUBLISHED)
    content = _random_lora(network, rank)
    began = time.perf_counter()
    lora = parse_lora(content, changeable(network), "random")
    parse_ms = (time.perf_counter() - began) * 1000
    weights = bind(lora, "random", network, CPU)
    sets = [[ScaledLora(weights, scale)] for scale in (0.5, 1.0, -1.0)]
    for count in (1, 2):
        samples = [
            _ms(lambda one=one * count: adapted(network, one, torch.bfloat16)) for one in islice(cycle(sets), 20)
        ]
        report(
            f"a switch to {count} LoRA(s) of rank {rank} on the published architecture, bfloat16 on a CPU",
            layers=len(weights.layers),
            mb=round(weights.size_bytes / 1e6),
            switch_ms=spread(samples),
            read_ms=round(parse_ms),
        )


def test_styles_by_the_checker() -> None:
    pipe = ZImagePipeline.from_pretrained(DEMO / "checkpoint", torch_dtype=torch.float32)
    asks = [ask for ask in draw_cases(120, held_out=False, seed=5) if ask.composition.layout != "night"]
    asks = [ask for ask in asks if all(thing.colour != "black" for thing in ask.composition.things)][:40]
    loras = {style: pipe.load_lora(DEMO / "loras" / f"demo-{style}.safetensors") for style in ("night", "outline")}
    sets: dict[str, list[tuple[LoraWeights, float]]] = {
        "none": [],
        "night": [(loras["night"], 1.0)],
        "night at 0.5": [(loras["night"], 0.5)],
        "outline": [(loras["outline"], 1.0)],
        "outline at 0.5": [(loras["outline"], 0.5)],
    }
    shares: dict[str, dict[str, float]] = {}
    for name, uses in sets.items():
        images = [pipe(ask.text, width=128, height=128, seed=ask.seed, loras=uses) for ask in asks]
        styles = [style_of(np.asarray(image)) for image in images]
        shares[name] = {style: round(styles.count(style) / len(asks), 3) for style in ("plain", "night", "outline")}
    report("fraction of images in a LoRA's style, demo checkpoint", images=len(asks), **shares)


def _random_lora(network: ZImageTransformer2DModel, rank: int) -> bytes:
    tensors: dict[str, Tensor] = {}
    for name, (out, into) in changeable(network).items():
        if "attention" in name or "feed_forward" in name:
            tensors[f"diffusion_model.{name}.lora_A.weight"] = torch.randn(rank, into).bfloat16()
            tensors[f"diffusion_model.{name}.lora_B.weight"] = torch.randn(out, rank).bfloat16()
    return save(tensors)


def _forward_ms(model: VelocityModel, prompt: Tensor, latents: Tensor) -> float:
    plan = model.plan(prompt, latent_size(128, 128), LEVELS)
    return _ms(lambda: model.velocity(plan, latents, 3))


def _ms(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1000

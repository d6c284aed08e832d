"""How long does our forward of the transformer take against that of diffusers, and how many operators does it launch?

Method: both run on the same weights with the same latents, prompt and noise level. After a warm-up they alternate: ours
and theirs are first in a pair alternately, and a sample is the ratio of the two times of a pair. Our plan is ready, and
its time is reported separately, because it is spent once per image. Launches are the operators that compute something
(views of a tensor are not counted). On a CPU: the demo checkpoint in float32, one thread. On a GPU: the published
architecture with random weights in bfloat16, eager and compiled; the limit is the forward's FLOPs at the rate that a
large matrix product reaches in the same run.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.benchmarks.report import report, spread
from zcore.checkpoint.geometry import image_tokens, latent_size, padded
from zcore.imaging.network.velocity_model import Plan, VelocityModel
from zcore.imaging.sampling.schedule import sigmas
from zcore.imaging.weights.loader import build_meta

pytestmark = pytest.mark.benchmarks

DEMO = Path(__file__).resolve().parents[2] / "zcore" / "demo" / "checkpoint" / "transformer"
LEVELS = sigmas(8, 3.0)
STEP = 3
PROMPT_TOKENS = 101


@pytest.fixture(autouse=True)
def no_gradients_and_one_thread() -> Iterator[None]:
    """Run everything as the worker does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Forwards:
    """The same step of the same image, by both implementations."""

    ours: Callable[[], Tensor]
    theirs: Callable[[], Tensor]
    plan: Callable[[], Plan]


@pytest.mark.parametrize("side_px", [128, 256])
def test_forward_on_a_cpu(side_px: int) -> None:
    network = ZImageTransformer2DModel.from_pretrained(DEMO).eval().requires_grad_(False)
    forwards = _forwards(network, VelocityModel(network, network.device, network.dtype), side_px)
    assert torch.equal(forwards.ours(), forwards.theirs())
    ours_ms, theirs_ms = _alternately(forwards, 100)
    report(
        f"a forward of the demo checkpoint on a CPU, ours against diffusers', {side_px} px, {PROMPT_TOKENS} tokens",
        ours_ms=spread(ours_ms),
        diffusers_ms=spread(theirs_ms),
        ratio=spread([ours / theirs for ours, theirs in zip(ours_ms, theirs_ms, strict=True)]),
        plan_ms=spread([_ms(forwards.plan) for _ in range(20)]),
        launches=_launches(forwards.ours),
        diffusers_launches=_launches(forwards.theirs),
        plan_launches=_launches(forwards.plan),
    )


@pytest.mark.gpu
def test_forward_on_a_gpu(layout_dir: Path) -> None:
    network = _published_architecture(layout_dir)
    eager = VelocityModel(network, network.device, network.dtype)
    compiled = VelocityModel(network, network.device, network.dtype, compile_mode="default")
    tflops = _matrix_product_tflops()
    sides = (512, 1024, 2048)
    measured: dict[int, dict[str, Any]] = {}
    for side_px in sides:
        forwards = _forwards(network, eager, side_px)
        difference = (forwards.ours() - forwards.theirs()).abs().max().item()
        ours_ms, theirs_ms = _alternately(forwards, 20)
        measured[side_px] = {
            "launches": _launches(forwards.ours),
            "diffusers_launches": _launches(forwards.theirs),
            "largest_difference": difference,
            "eager_ms": spread(ours_ms),
            "diffusers_eager_ms": spread(theirs_ms),
        }
    # From here on diffusers' blocks are compiled; our forward does not use them.
    network.compile_repeated_blocks(fullgraph=True)
    for side_px in sides:
        ours_ms, theirs_ms = _alternately(_forwards(network, compiled, side_px), 20)
        measured[side_px] |= {"compiled_ms": spread(ours_ms), "diffusers_compiled_ms": spread(theirs_ms)}
    for side_px, results in measured.items():
        limit_ms = _flops(side_px) / tflops / 1e9
        report(
            f"a forward of the published architecture, random weights, bfloat16, {side_px} px, {PROMPT_TOKENS} tokens",
            gpu=torch.cuda.get_device_name(),
            **results,
            limit_ms=round(limit_ms, 2),
            limit_tflops=round(tflops),
            eager_over_limit=round(results["eager_ms"]["p50"] / limit_ms, 2),
            compiled_over_limit=round(results["compiled_ms"]["p50"] / limit_ms, 2),
        )


def _forwards(network: ZImageTransformer2DModel, model: VelocityModel, side_px: int) -> Forwards:
    generator = torch.Generator().manual_seed(0)
    size = latent_size(side_px, side_px)
    latents = torch.randn(16, size.height, size.width, generator=generator).to(network.device)
    prompt = torch.randn(PROMPT_TOKENS, network.config.cap_feat_dim, generator=generator)
    prompt = prompt.to(network.device, network.dtype)
    plan = model.plan(prompt, size, LEVELS)

    def theirs() -> Tensor:
        t = torch.full((1,), 1.0 - LEVELS[STEP], device=network.device)
        frame = latents.to(network.dtype).unsqueeze(1)
        return -network([frame], t, [prompt], return_dict=False)[0][0].squeeze(1).float()

    return Forwards(
        ours=lambda: model.velocity(plan, latents, STEP), theirs=theirs, plan=lambda: model.plan(prompt, size, LEVELS)
    )


def _alternately(forwards: Forwards, pairs: int) -> tuple[list[float], list[float]]:
    """Return the milliseconds of both, pair by pair."""
    for _ in range(5):
        forwards.ours(), forwards.theirs()
    ours: list[float] = []
    theirs: list[float] = []
    for pair in range(pairs):
        both = [(forwards.ours, ours), (forwards.theirs, theirs)]
        for forward, samples in both if pair % 2 else reversed(both):
            samples.append(_ms(forward))
    return ours, theirs


def _ms(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - began) * 1000


class _Launches(TorchDispatchMode):
    """Counts operators that create or change values."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = [given.alias_info is not None and not given.alias_info.is_write for given in func._schema.returns]
        self.count += not any(views)
        return func(*args, **(kwargs or {}))


def _launches(work: Callable[[], object]) -> int:
    with _Launches() as launches:
        work()
    return launches.count


def _published_architecture(layout_dir: Path) -> ZImageTransformer2DModel:
    """Return the architecture with 12 GB of random weights, small enough that nothing overflows."""
    network: Any = build_meta(layout_dir).transformer.to(torch.bfloat16).to_empty(device="cuda")
    torch.manual_seed(0)
    for name, weight in network.named_parameters():
        weight.fill_(1.0) if "norm" in name and weight.ndim == 1 else weight.normal_(std=0.02)
    return network.eval().requires_grad_(False)


def _flops(side_px: int) -> float:
    """Return the multiplications and additions of a forward with its caption refiner."""
    image, caption = padded(image_tokens(side_px, side_px)), padded(PROMPT_TOKENS)
    both, width, hidden = image + caption, 3840, 10240
    linear = 2 * (4 * width**2 + 3 * width * hidden) * (30 * both + 2 * image)
    attention = 4 * width * (30 * both**2 + 2 * image**2)
    return linear + attention + 2 * 2 * 64 * width * image


def _matrix_product_tflops() -> float:
    """Return the rate of the fastest of 20 products of 8192 x 8192 matrices in bfloat16."""
    side = 8192
    one, other = torch.randn(2, side, side, device="cuda", dtype=torch.bfloat16)
    best_ms = min(_ms(lambda: one @ other) for _ in range(20))
    return 2 * side**3 / best_ms / 1e9

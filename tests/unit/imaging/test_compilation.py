"""The compiled forward is one graph for every size and prompt, and equals the eager one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor
from torch._dynamo.utils import counters

from tests.numerics import ONE_FORWARD, assert_close_relative
from tests.unit.imaging.lora_layouts import LAYOUTS
from tests.unit.imaging.test_forward import LEVELS, noise_of, prompt_of
from zcore.checkpoint.geometry import LatentSize
from zcore.choices import Quantization
from zcore.imaging.lora.adapters import ScaledLora, changeable
from zcore.imaging.network.velocity_model import Sample, VelocityModel
from zcore.imaging.weights.quantization import pack, packable

# torch's own compiler still uses what torch deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.* does not implement _stable_hash_for_caching:UserWarning"),
]


@pytest.fixture
def weights(tiny_folder: Path) -> ZImageTransformer2DModel:
    """Random weights in float32, with the fewest blocks of each kind that are still several."""
    network = ZImageTransformer2DModel.from_pretrained(tiny_folder / "transformer").eval().requires_grad_(False)
    del network.noise_refiner[1:], network.layers[2:]
    return network


@pytest.fixture
def graphs() -> Iterator[None]:
    """No graph exists before the test or after it."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def only_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are captured, guarded and run, but not translated into machine code, which takes most of the time."""
    compile_ = torch.compile

    def capture(function: Any, *, mode: str, **options: Any) -> Any:
        return compile_(function, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", capture)


@pytest.fixture
def compiled(weights: ZImageTransformer2DModel, graphs: None) -> VelocityModel:
    """The network, to be compiled when it first runs."""
    return VelocityModel(weights, torch.device("cpu"), torch.float32, compile_mode="default")


@pytest.mark.timeout(1800)
def test_one_graph_without_a_break_serves_every_size_and_prompt(
    weights: ZImageTransformer2DModel, compiled: VelocityModel
) -> None:
    eager = VelocityModel(weights, torch.device("cpu"), torch.float32)

    def agree(*of: tuple[LatentSize, int, int]) -> None:
        """Check that both give the same for samples of this size, prompt length, and step."""
        plans = eager.plans([Sample(prompt_of(weights, words), size, LEVELS) for size, words, _ in of])
        latents: list[Tensor] = [noise_of(size, seed) for seed, (size, _, _) in enumerate(of)]
        steps = [step for _, _, step in of]
        pairs = zip(compiled.velocities(plans, latents, steps), eager.velocities(plans, latents, steps), strict=True)
        for one, other in pairs:
            assert_close_relative(one, other, roundings=ONE_FORWARD)

    with torch.inference_mode(), torch._dynamo.config.patch(error_on_recompile=True):
        # 64 image tokens with 64 channels: axes of equal length must not be treated as one axis.
        agree((LatentSize(16, 16), 20, 0))
        agree((LatentSize(32, 24), 50, 3))
        agree((LatentSize(10, 14), 300, 7))
    assert counters["stats"]["unique_graphs"] == 1
    with torch.inference_mode():
        agree((LatentSize(32, 24), 20, 1), (LatentSize(10, 14), 50, 6))
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


def test_loras_of_one_kind_share_a_graph_and_those_beyond_the_limit_run_eagerly(
    weights: ZImageTransformer2DModel, only_captured: None, compiled: VelocityModel
) -> None:
    eager = VelocityModel(weights, torch.device("cpu"), torch.float32)
    shapes = changeable(weights)

    def agree(layout: str, scale: float) -> None:
        loras = [ScaledLora(eager.lora(LAYOUTS[layout](shapes).content, layout), scale)]
        prompt, size, latents = prompt_of(weights, 20), LatentSize(16, 16), noise_of(LatentSize(16, 16))
        one, other = compiled.adapted(loras), eager.adapted(loras)
        pair = [model.velocity(model.plan(prompt, size, LEVELS), latents, 2) for model in (one, other)]
        assert_close_relative(*pair, roundings=ONE_FORWARD)

    with torch.inference_mode(), torch._dynamo.config.patch(recompile_limit=1):
        agree("kohya", 1.0)
        agree("ai-toolkit", 0.5)
        assert counters["stats"]["unique_graphs"] == 1
        agree("LoKr", 0.5)
        agree("kohya", -1.0)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("kind", ["none", "8bit", "4bit"])
@pytest.mark.usefixtures("graphs", "only_captured")
def test_weights_copied_for_each_generation_use_the_same_graph(
    weights: ZImageTransformer2DModel, kind: Quantization
) -> None:
    for name in packable(weights):
        pack(weights, name, kind)
    offloaded = VelocityModel(weights, torch.device("cpu"), torch.float32, compile_mode="default", offload="network")
    size, prompt = LatentSize(16, 16), prompt_of(weights, 20)
    found: list[Tensor] = []
    with torch.inference_mode(), torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            model = offloaded.on_device()
            found.append(model.velocity(model.plan(prompt, size, LEVELS), noise_of(size, 1), 0))
    assert counters["stats"]["unique_graphs"] == 1
    assert torch.equal(found[0], found[2])

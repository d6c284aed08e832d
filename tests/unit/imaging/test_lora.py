"""A LoRA of any layout has the effect of merging it by hand, and leaves no state behind."""

import copy
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor

from tests.numerics import ONE_FORWARD
from tests.unit.imaging.lora_layouts import LAYOUTS, Written
from tests.unit.imaging.test_forward import LEVELS, by_diffusers, noise_of
from zcore.checkpoint.geometry import LatentSize
from zcore.imaging.lora.adapters import LoraWeights, ScaledLora, adapted, bind, changeable, fuse
from zcore.imaging.lora.changes import Lora, LoraLayer, LowRank
from zcore.imaging.network.velocity_model import VelocityModel

CPU = torch.device("cpu")
ROUNDING = ONE_FORWARD * torch.finfo(torch.float32).eps
"""Largest difference between the results of two summation orders, relative to the norm."""
SIZE = LatentSize(10, 14)
LORAS = Path(__file__).resolve().parents[3] / "zcore" / "demo" / "loras"


@pytest.fixture(scope="module")
def network(tiny_folder: Path) -> ZImageTransformer2DModel:
    """Random weights in float32. Tests must not change them."""
    network = ZImageTransformer2DModel.from_pretrained(tiny_folder / "transformer")
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model(network: ZImageTransformer2DModel) -> VelocityModel:
    return VelocityModel(network, CPU, torch.float32)


def written(network: ZImageTransformer2DModel, layout: str, seed: int = 0) -> Written:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LAYOUTS[layout](changeable(network))


def velocity(model: VelocityModel, step: int = 3) -> Tensor:
    with torch.inference_mode():
        plan = model.plan(torch.randn(20, 64, generator=torch.Generator().manual_seed(1)), SIZE, LEVELS)
        return model.velocity(plan, noise_of(SIZE), step)


def by_hand(network: ZImageTransformer2DModel, *scaled: tuple[Written, float]) -> Tensor:
    """Run diffusers' own forward on weights that are changed here."""
    merged = copy.deepcopy(network)
    for name in {name for file, _ in scaled for name in file.changes}:
        weight = network.get_submodule(name).weight.double()
        changed = weight.clone()
        for file, scale in scaled:
            if name in file.changes:
                changed += scale * (effect(weight, file.changes[name].double(), file.magnitudes.get(name)) - weight)
        merged.get_submodule(name).weight.copy_(changed)
    prompt = torch.randn(20, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return by_diffusers(merged, [noise_of(SIZE)], [LEVELS[3]], [prompt])[0]


def effect(weight: Tensor, change: Tensor, magnitude: Tensor | None) -> Tensor:
    changed = weight + change
    return changed if magnitude is None else changed / changed.norm(dim=1, keepdim=True) * magnitude[:, None]


def relative_difference(one: Tensor, other: Tensor) -> float:
    """Return the norm of the difference relative to the norm."""
    return float((one - other).double().norm() / other.double().norm())


def state(network: ZImageTransformer2DModel) -> Mapping[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale", [1.0, -0.7])
def test_every_layout_has_the_effect_of_merging_by_hand(
    network: ZImageTransformer2DModel, model: VelocityModel, layout: str, scale: float
) -> None:
    file = written(network, layout)
    lora = model.lora(file.content, layout)
    assert lora.layers.keys() == file.changes.keys()
    changed = velocity(model.adapted([ScaledLora(lora, scale)]))

    assert relative_difference(velocity(model), changed) > 0.01
    assert relative_difference(changed, by_hand(network, (file, scale))) < ROUNDING


@pytest.mark.numeric
@pytest.mark.parametrize(
    "layouts",
    [
        ("diffusers", "kohya", "LoHa"),
        ("fused qkv, musubi", "ai-toolkit", "LoKr, fused qkv"),
        ("LoKr", "diffusers", "LoKr, LyCORIS, right side in two"),
        ("DoRA, PEFT", "DoRA of LoKr", "kohya"),
    ],
)
def test_several_with_scales_are_the_sum_of_each(
    network: ZImageTransformer2DModel, model: VelocityModel, layouts: tuple[str, ...]
) -> None:
    files = [written(network, layout, seed) for seed, layout in enumerate(layouts)]
    scales = [0.5, -0.25, 1.5]
    loras = [ScaledLora(model.lora(file.content, "style"), scale) for file, scale in zip(files, scales, strict=True)]
    expected = by_hand(network, *zip(files, scales, strict=True))
    assert relative_difference(velocity(model.adapted(loras)), expected) < ROUNDING


def test_a_hundred_switches_leave_the_network_bit_for_bit_as_it_was(tiny_folder: Path) -> None:
    network = ZImageTransformer2DModel.from_pretrained(tiny_folder / "transformer").eval().requires_grad_(False)
    model = VelocityModel(network, CPU, torch.float32)
    before, base, layers = state(network), velocity(model), list(network.modules())
    loras = [model.lora(written(network, layout).content, layout) for layout in ("kohya", "LoKr", "DoRA, PEFT")]
    expected = [velocity(model.adapted([ScaledLora(lora, 0.8)])) for lora in loras]
    for switch in range(100):
        changed = model.adapted([ScaledLora(loras[switch % 3], 0.8)])
        if switch % 10 == 0:
            assert torch.equal(velocity(changed), expected[switch % 3])
    assert all(one is other for one, other in zip(network.modules(), layers, strict=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert torch.equal(velocity(model), base)


def test_a_scale_of_zero_is_the_model_itself(network: ZImageTransformer2DModel, model: VelocityModel) -> None:
    lora = model.lora(written(network, "DoRA, PEFT").content, "style")
    assert model.adapted([]) is model
    assert model.adapted([ScaledLora(lora, 0.0)]) is model


@pytest.mark.parametrize("layout", ["kohya", "LoHa", "LoKr, fused qkv", "DoRA, kohya", "DoRA of LoKr"])
def test_a_fused_lora_has_the_effect_of_an_unfused_one(
    tiny_folder: Path, network: ZImageTransformer2DModel, layout: str
) -> None:
    fused = ZImageTransformer2DModel.from_pretrained(tiny_folder / "transformer").eval().requires_grad_(False)
    model = VelocityModel(network, CPU, torch.float32)
    loras = [
        ScaledLora(model.lora(written(network, layout).content, layout), 0.8),
        ScaledLora(model.lora(written(network, "diffusers", 1).content, "diffusers"), 0.3),
    ]
    fuse(fused, loras)
    assert (
        relative_difference(velocity(VelocityModel(fused, CPU, torch.float32)), velocity(model.adapted(loras)))
        < ROUNDING
    )


@pytest.mark.parametrize("layout", ["kohya", "LoHa", "LoKr", "DoRA, PEFT"])
def test_in_bfloat16_the_difference_is_only_rounding(tiny_folder: Path, layout: str) -> None:
    network = ZImageTransformer2DModel.from_pretrained(tiny_folder / "transformer").eval().requires_grad_(False)
    file = written(network, layout)
    exact = velocity(adapted_by(network, file, torch.float32))
    rounded = velocity_in_bfloat16(adapted_by(network.to(torch.bfloat16), file, torch.bfloat16))
    assert relative_difference(rounded, exact) < 0.05


def adapted_by(network: ZImageTransformer2DModel, file: Written, dtype: torch.dtype) -> VelocityModel:
    model = VelocityModel(network, CPU, dtype)
    return model.adapted([ScaledLora(model.lora(file.content, "style"), 1.0)])


def velocity_in_bfloat16(model: VelocityModel) -> Tensor:
    prompt = torch.randn(20, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.inference_mode():
        return model.velocity(model.plan(prompt, SIZE, LEVELS), noise_of(SIZE), 3)


@pytest.mark.parametrize("style", ["night", "outline"])
def test_the_shipped_loras_are_read_completely(demo_folder: Path, style: str) -> None:
    network = ZImageTransformer2DModel.from_pretrained(demo_folder / "transformer").eval().requires_grad_(False)
    lora: LoraWeights = VelocityModel(network, CPU, torch.float32).lora(
        (LORAS / f"demo-{style}.safetensors").read_bytes(), style
    )
    assert len(lora.layers) == 42
    assert lora.name == style
    assert 300_000 < lora.size_bytes < 400_000


def test_a_dora_on_a_layer_with_a_bias_is_on_the_loras_device_even_if_the_layer_is_not() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(6, 4, bias=True)).requires_grad_(False)
    change = LowRank(down=torch.ones(2, 6), up=torch.ones(4, 2), factor=1.0)
    elsewhere = torch.device("meta")
    lora = bind(Lora("0" * 64, {"0": LoraLayer(change, torch.ones(4))}), "style", network, elsewhere)
    gain = adapted(network, [ScaledLora(lora, 1.0)], torch.float32)[0]._gain
    assert (gain.factor.device, gain.shift.device) == (elsewhere, elsewhere)

"""Quantized weights have the expected size, compute nearly the same as plain ones, and are only in the blocks."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.numerics import ONE_KERNEL, assert_close_relative
from zcore.checkpoint.geometry import LatentSize
from zcore.choices import Quantization
from zcore.errors import InvalidLora
from zcore.imaging.lora.adapters import ScaledLora, bind, fuse
from zcore.imaging.lora.changes import Lora, LoraLayer, LowRank
from zcore.imaging.network.velocity_model import VelocityModel
from zcore.imaging.text.text_encoder import LayerBlend, TextEncoder
from zcore.imaging.weights.loader import Placement, build_meta, load_text_encoder, load_transformer
from zcore.imaging.weights.quantization import is_plain, pack, packable

CPU = torch.device("cpu")
KINDS: tuple[Quantization, ...] = ("8bit", "fp8", "4bit")
BYTES = {"8bit": 1.0, "fp8": 1.0, "4bit": 0.5625}
"""Bytes per weight, including the scale for each 64; a scale for each row comes on top."""

LAYER_ERROR = {"8bit": 0.012, "fp8": 0.035, "4bit": 0.11}
"""Relative error of one layer's output for normally distributed weights."""


@pytest.fixture(scope="module")
def network(demo_folder: Path) -> nn.Module:
    """The demo transformer in float32. Tests must not change it."""
    return load_transformer(demo_folder, Placement(CPU, torch.float32))


def packed_copy(network: nn.Module, kind: Quantization) -> nn.Module:
    """Return a copy with all packable layers quantized."""
    other = copy.deepcopy(network)
    for name in packable(network):
        pack(other, name, kind)
    return other


def bytes_of(network: nn.Module) -> int:
    """Return the bytes that the tensors really hold."""
    return sum(part.numel() * part.element_size() for one in network.state_dict().values() for part in parts_of(one))


def parts_of(tensor: Any) -> list[Tensor]:
    """Return the plain tensors inside a quantized one."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]


def relative_error(found: Tensor, true: Tensor) -> float:
    return float((found.float() - true.float()).norm() / true.float().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_layer_computes_nearly_the_same_in_its_own_dtype(kind: Quantization, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(256, 384, bias=True)).to(dtype).requires_grad_(False)
    x = torch.randn(5, 3, 256)
    true = network.float()(x)
    network.to(dtype)
    pack(network, "0", kind)
    y = network(x.to(dtype))
    assert y.dtype == dtype
    assert 0 < relative_error(y, true) < LAYER_ERROR[kind]
    assert not is_plain(getattr(network[0], "weight", torch.empty(0, dtype=torch.uint8)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_network_has_the_size_of_its_kind(network: nn.Module, kind: Quantization) -> None:
    weights = {name: network.get_submodule(name).weight for name in packable(network)}
    rest = bytes_of(network) - sum(weight.numel() * 4 for weight in weights.values())
    rows = 0 if kind == "4bit" else sum(weight.shape[0] for weight in weights.values())
    expected = rest + BYTES[kind] * sum(weight.numel() for weight in weights.values()) + 4 * rows
    zero_points = rows if kind == "8bit" else 0
    assert bytes_of(packed_copy(network, kind)) == expected + zero_points


def test_in_the_published_networks_the_blocks_are_quantized(layout_dir: Path) -> None:
    networks = build_meta(layout_dir)
    for network, layers, share in ((networks.transformer, 34 * 7, 0.977), (networks.text_encoder, 36 * 7, 0.903)):
        names = packable(network)
        count = sum(parameter.numel() for parameter in network.parameters())
        assert len(names) == layers
        assert sum(network.get_submodule(name).weight.numel() for name in names) / count == pytest.approx(
            share, abs=1e-3
        )
        assert all(part not in name for name in names for part in ("adaLN", "embed", "final"))


@pytest.mark.parametrize(("kind", "bound"), [("8bit", 0.01), ("fp8", 0.04), ("4bit", 0.12)])
def test_the_demo_models_velocity_and_embedding_stay_close(
    demo_folder: Path, network: nn.Module, kind: Quantization, bound: float
) -> None:
    torch.manual_seed(2)
    size, latents, embeds = LatentSize(16, 16), torch.randn(16, 16, 16), torch.randn(20, network.config.cap_feat_dim)

    def velocity(weights: nn.Module) -> Tensor:
        model = VelocityModel(weights, CPU, torch.float32)
        return model.velocity(model.plan(embeds, size, [0.8, 0.0]), latents, 0)

    encoder = load_text_encoder(demo_folder, Placement(CPU, torch.float32))

    def embedding(weights: nn.Module) -> Tensor:
        return TextEncoder(weights, CPU).encode(range(30, 60), LayerBlend(((-2, 1.0),)))

    with torch.inference_mode():
        assert 0 < relative_error(velocity(packed_copy(network, kind)), velocity(network)) < bound
        assert 0 < relative_error(embedding(packed_copy(encoder, kind)), embedding(encoder)) < bound


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.* does not implement _stable_hash_for_caching:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_layer_is_compiled_without_a_graph_break(kind: Quantization) -> None:
    network = nn.Sequential(nn.Linear(64, 128)).requires_grad_(False)
    pack(network, "0", kind)
    x = torch.randn(4, 64)
    torch._dynamo.reset()
    with torch.inference_mode():
        compiled = torch.compile(network, fullgraph=True)(x)
        assert_close_relative(compiled, network(x), roundings=ONE_KERNEL)
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_works_with_quantized_weights_and_a_dora_does_not(network: nn.Module, kind: Quantization) -> None:
    packed = packed_copy(network, kind)
    name = "layers.0.attention.to_q"
    layer = packed.get_submodule(name)
    change = LowRank(down=torch.randn(4, layer.in_features), up=torch.randn(layer.out_features, 4), factor=0.5)
    plain = bind(Lora("0" * 64, {name: LoraLayer(change, None)}), "style", packed, CPU)
    model = VelocityModel(packed, CPU, torch.float32).adapted([ScaledLora(plain, 1.0)])
    x = torch.randn(3, layer.in_features)
    found = model._weights.layers[0].attention.to_q(x)
    assert_close_relative(found, layer(x) + x @ change.dense().T, roundings=3 * ONE_KERNEL)
    with pytest.raises(
        InvalidLora, match=r"needs the unquantized weights of layers.0.attention.to_q; load the model without"
    ):
        bind(Lora("0" * 64, {name: LoraLayer(change, torch.ones(layer.out_features))}), "dora", packed, CPU)
    with pytest.raises(InvalidLora, match="needs the unquantized weights"):
        fuse(packed, [ScaledLora(plain, 1.0)])

"""The networks equal those of diffusers and transformers, and are built without importing either."""

import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from torch import nn
from transformers import Qwen3Config, Qwen3Model

from tests.numerics import ONE_KERNEL, assert_close_relative
from zcore.errors import CheckpointError
from zcore.imaging.architecture.text_network import TextNetwork, TextNetworkConfig, causal_mask, rotary_tables
from zcore.imaging.architecture.transformer_network import TransformerNetwork
from zcore.imaging.architecture.vae_network import VaeConfig, VaeNetwork
from zcore.imaging.weights.loader import Placement, build_meta, load_transformer, load_vae

CPU = torch.device("cpu")
STOCK_TRANSFORMER: Any = ZImageTransformer2DModel  # the libraries' types are incomplete
STOCK_TEXT_ENCODER: Any = Qwen3Model
STOCK_VAE: Any = AutoencoderKL
HEAVY = (
    "torch._dynamo",
    "torch._inductor",
    "sympy",
    "torchao",
    "bitsandbytes",
    "diffusers",
    "transformers",
    "accelerate",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_vae_equals_that_of_diffusers(demo_folder: Path, dtype: torch.dtype) -> None:
    stock = STOCK_VAE.from_pretrained(demo_folder / "vae", torch_dtype=dtype)
    ours = cast(VaeNetwork, load_vae(demo_folder, Placement(CPU, dtype)))
    pixels, latents = torch.rand(1, 3, 64, 96).to(dtype) * 2 - 1, torch.randn(2, 16, 8, 6).to(dtype)
    with torch.inference_mode():
        pairs = [
            (ours.encode(pixels), stock.encode(pixels).latent_dist.parameters),
            (ours.decode(latents), stock.decode(latents).sample),
        ]
    for found, expected in pairs:
        assert found.dtype == expected.dtype == dtype
        if dtype == torch.float32:
            assert torch.equal(found, expected)
        else:  # a CPU's convolutions in bfloat16 do not always give the same bits
            assert_close_relative(found, expected, roundings=ONE_KERNEL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_transformers_own_layers_equal_those_of_diffusers(demo_folder: Path, dtype: torch.dtype) -> None:
    stock = STOCK_TRANSFORMER.from_pretrained(demo_folder / "transformer", torch_dtype=dtype)
    ours: Any = cast(TransformerNetwork, load_transformer(demo_folder, Placement(CPU, dtype)))
    x, times = torch.randn(2, 5, 192).to(dtype), torch.tensor([0.0, 417.3])
    with torch.inference_mode():
        assert torch.equal(ours.t_embedder(times), stock.t_embedder(times))
        for name in ("feed_forward", "attention_norm1", "ffn_norm2"):
            assert torch.equal(getattr(ours.layers[1], name)(x), getattr(stock.layers[1], name)(x))


@pytest.mark.parametrize("has_attention", [True, False])
@pytest.mark.parametrize("is_quantized", [True, False], ids=["quant_conv", "no quant_conv"])
def test_every_kind_of_vae_equals_that_of_diffusers(has_attention: bool, is_quantized: bool) -> None:
    stock = STOCK_VAE(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        layers_per_block=2,
        norm_num_groups=8,
        mid_block_add_attention=has_attention,
        use_quant_conv=is_quantized,
        use_post_quant_conv=is_quantized,
    ).eval()
    ours = VaeNetwork(msgspec.convert(dict(stock.config), VaeConfig)).eval()
    ours.load_state_dict(stock.state_dict())
    pixels, latents = torch.rand(1, 3, 24, 40) * 2 - 1, torch.randn(2, 4, 6, 10)
    with torch.inference_mode():
        assert torch.equal(ours.encode(pixels), stock.encode(pixels).latent_dist.parameters)
        assert torch.equal(ours.decode(latents), stock.decode(latents).sample)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("padding", [None, (0, 7, 39)], ids=["one prompt", "padded"])
def test_every_kind_of_text_network_equals_that_of_transformers(
    dtype: torch.dtype, key_heads: int, has_bias: bool, padding: tuple[int, ...] | None
) -> None:
    length = 40
    config = Qwen3Config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=key_heads,
        head_dim=16,
        attention_bias=has_bias,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    stock = STOCK_TEXT_ENCODER(config).eval()
    for name, weight in stock.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(weight)
        weight.data = weight.data.to(dtype)  # not the rotary frequencies, which stay float32 in a loaded model
    ours = TextNetwork(msgspec.convert(config.to_dict(), TextNetworkConfig)).to(dtype).eval()
    ours.load_state_dict(stock.state_dict())
    ids = torch.randint(50, (len(padding or (0,)), length))
    exists = None if padding is None else torch.arange(length)[None] < length - torch.tensor(padding)[:, None]
    with torch.inference_mode():
        expected = stock(input_ids=ids, attention_mask=exists).last_hidden_state
        hidden = ours.embed_tokens(ids)
        rotary = rotary_tables(ours.config, length, hidden)
        for block in ours.layers:
            hidden = block(hidden, rotary, causal_mask(exists))
        assert expected.std() > 0.1
        assert torch.equal(ours.norm(hidden), expected)


def test_the_real_architectures_are_those_of_the_libraries(layout_dir: Path) -> None:
    networks = build_meta(layout_dir)
    with torch.device("meta"):
        stock: dict[str, Any] = {
            "transformer": STOCK_TRANSFORMER(**_config(layout_dir, "transformer")),
            "text_encoder": STOCK_TEXT_ENCODER(STOCK_TEXT_ENCODER.config_class(**_config(layout_dir, "text_encoder"))),
            "vae": STOCK_VAE(**_config(layout_dir, "vae")),
        }
    for name, network in stock.items():
        assert _shapes(getattr(networks, name)) == _shapes(network), name


@pytest.mark.parametrize(
    ("component", "change", "named"),
    [
        ("transformer", {"siglip_feat_dim": 1152}, r"transformer/config\.json: .*siglip_feat_dim"),
        ("text_encoder", {"hidden_act": "gelu"}, r"text_encoder/config\.json: .*hidden_act"),
        ("text_encoder", {"use_sliding_window": True}, r"text_encoder/config\.json: use_sliding_window must be false"),
        ("vae", {"latents_mean": [0.1]}, r"vae/config\.json: .*latents_mean"),
    ],
)
def test_an_architecture_that_is_not_supported_is_refused(
    tmp_path: Path, demo_folder: Path, component: str, change: dict[str, Any], named: str
) -> None:
    for name in ("transformer", "text_encoder", "vae"):
        (tmp_path / name).mkdir()
        config = {**_config(demo_folder, name), **(change if name == component else {})}
        (tmp_path / name / "config.json").write_bytes(msgspec.json.encode(config))
    with pytest.raises(CheckpointError, match=named):
        build_meta(tmp_path)


@pytest.mark.parametrize("written", [{"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5}}])
def test_the_rotary_base_is_read_as_any_version_of_transformers_writes_it(
    demo_folder: Path, written: dict[str, Any]
) -> None:
    config: dict[str, Any] = {**_config(demo_folder, "text_encoder"), "rope_parameters": {}, **written}
    assert msgspec.convert(config, TextNetworkConfig).rotary_base == 5e5


def test_one_image_imports_no_compiler_and_no_model_library(tmp_path: Path) -> None:
    program = f"""
import sys
from zcore.cli import main
status = main(["generate", "a", "--profile", "demo", "--size", "64x64", "--steps", "1", "--output", "a.png"])
print(status, sorted(set({HEAVY}) & set(sys.modules)))
"""
    finished = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert finished.stdout.splitlines()[-1:] == ["0 []"], finished.stderr


def _config(folder: Path, component: str) -> dict[str, Any]:
    config = msgspec.json.decode((folder / component / "config.json").read_bytes())
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in network.named_parameters()}

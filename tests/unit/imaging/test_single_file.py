"""Weights from single files of any layout equal those of the folder; incomplete files are refused."""

import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from safetensors.torch import save as safetensors_save
from torch import Tensor, nn

from tests.numerics import assert_close_relative, assert_levels_close
from zcore.checkpoint.files import IMAGE_COMPONENTS, read_json, revision
from zcore.checkpoint.geometry import LatentSize
from zcore.errors import CheckpointError
from zcore.imaging.generation_inputs import Inputs
from zcore.imaging.network.velocity_model import VelocityModel
from zcore.imaging.pipeline import ZImagePipeline
from zcore.imaging.text.text_encoder import LayerBlend, TextEncoder
from zcore.imaging.weights import loader
from zcore.imaging.weights.gguf_header import check_metadata_ends
from zcore.imaging.weights.loader import Placement, build_meta, load_text_encoder, load_transformer, load_vae
from zcore.imaging.weights.quantization import is_packed
from zcore.imaging.weights.single_file import in_own_names
from zcore.request import GenerationRequest, LoraUse

CPU = torch.device("cpu")
FLOAT32 = Placement(CPU, torch.float32)
LOADERS: dict[str, Any] = {"text_encoder": load_text_encoder, "transformer": load_transformer, "vae": load_vae}
FILES = {
    "text_encoder": "model.safetensors",
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
HALF = int(torch.finfo(torch.float16).eps / torch.finfo(torch.float32).eps)
"""One rounding in float16, the dtype of most scales, in epsilons of float32."""
GGUF_ERROR = {"Q8_0": 0.01, "Q5_1": 0.04, "Q4_0": 0.1}
"""Relative error of the demo model's velocity."""


def weights_of(folder: Path, component: str) -> dict[str, Tensor]:
    """Return the weights under the checkpoint's names."""
    return load_file(folder / component / FILES[component])


def comfy_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the transformer in ComfyUI's layout: one matrix for queries, keys, and values, and shorter names."""
    found: dict[str, Tensor] = {"norm_final.weight": torch.ones(3)}
    for name, tensor in weights.items():
        if ".attention.to_q." in name:
            parts = [weights[name.replace("to_q", f"to_{letter}")] for letter in "qkv"]
            found[name.replace("to_q", "qkv")] = torch.cat(parts)
        elif ".attention.to_k." not in name and ".attention.to_v." not in name:
            renamed = name.replace("all_x_embedder.2-1", "x_embedder").replace("all_final_layer.2-1", "final_layer")
            renamed = renamed.replace("attention.to_out.0", "attention.out")
            renamed = renamed.replace("attention.norm_q", "attention.q_norm")
            found[renamed.replace("attention.norm_k", "attention.k_norm")] = tensor
    return found


def original_vae(weights: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """Return the VAE in latent diffusion's layout: levels counted from the outside, attention as 1x1 convolutions."""
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        renamed = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
        renamed = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", renamed)
        renamed = re.sub(
            r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}", renamed
        )
        renamed = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", renamed)
        renamed = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", renamed)
        renamed = renamed.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if "mid_block.attentions.0" in renamed:
            renamed = renamed.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            for ours, theirs in {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}.items():
                renamed = renamed.replace(f".{ours}.", f".{theirs}.")
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        found[renamed] = tensor
    return found


def single_files(folder: Path) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Return the content of a file by component and layout."""
    transformer, encoder, vae = (weights_of(folder, name) for name in ("transformer", "text_encoder", "vae"))
    levels = len(read_json(folder / "vae" / "config.json")["up_block_types"])

    def prefixed(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {f"{prefix}{name}": tensor for name, tensor in weights.items()}

    whole = {
        **prefixed("model.diffusion_model.", comfy_names(transformer)),
        **prefixed("text_encoders.qwen3_4b.transformer.model.", encoder),
        **prefixed("vae.", original_vae(vae, levels)),
    }
    return {
        "transformer": {
            "diffusers": dict(transformer),
            "ComfyUI": comfy_names(transformer),
            "ComfyUI with a prefix": prefixed("diffusion_model.", comfy_names(transformer)),
            "all in one": whole,
        },
        "text_encoder": {
            "transformers": dict(encoder),
            "with its head": {**prefixed("model.", encoder), "lm_head.weight": torch.ones(2, 2)},
            "all in one": whole,
        },
        "vae": {
            "diffusers": dict(vae),
            "latent diffusion": original_vae(vae, levels),
            "latent diffusion with a prefix": prefixed("first_stage_model.", original_vae(vae, levels)),
            "all in one": whole,
        },
    }


def layouts() -> list[tuple[str, str]]:
    named = {
        "transformer": ["diffusers", "ComfyUI", "ComfyUI with a prefix", "all in one"],
        "text_encoder": ["transformers", "with its head", "all in one"],
        "vae": ["diffusers", "latent diffusion", "latent diffusion with a prefix", "all in one"],
    }
    return [(component, layout) for component, several in named.items() for layout in several]


def saved(content: Mapping[str, Tensor], path: Path) -> Path:
    save_file({name: tensor.contiguous().clone() for name, tensor in content.items()}, path)
    return path


@pytest.mark.parametrize(("component", "layout"), layouts())
def test_a_network_from_a_file_equals_that_of_the_folder_bit_for_bit(
    tiny_folder: Path, tmp_path: Path, component: str, layout: str
) -> None:
    path = saved(single_files(tiny_folder)[component][layout], tmp_path / "one.safetensors")
    expected: nn.Module = LOADERS[component](tiny_folder, FLOAT32)
    found: nn.Module = LOADERS[component](tiny_folder, FLOAT32, path)
    names = dict(expected.named_parameters())
    assert names.keys() == dict(found.named_parameters()).keys()
    assert all(torch.equal(tensor, names[name]) for name, tensor in found.named_parameters())
    assert all(torch.equal(a, b) for a, b in zip(found.buffers(), expected.buffers(), strict=True))


def test_the_published_names_and_shapes_are_all_accounted_for(layout_dir: Path, tmp_path: Path) -> None:
    """Tensors have the real shapes, but hold one number each."""
    networks = build_meta(layout_dir)
    levels = len(read_json(layout_dir / "vae" / "config.json")["up_block_types"])
    for component in ("transformer", "text_encoder", "vae"):
        network: nn.Module = getattr(networks, component)
        weights = {name: torch.zeros(1).expand(one.shape) for name, one in network.named_parameters()}
        given = weights
        if component == "transformer":
            given = comfy_names({name: torch.empty(one.shape, device="meta") for name, one in weights.items()})
            assert given["layers.0.attention.qkv.weight"].shape == (11520, 3840)
        if component == "vae":
            given = original_vae({name: torch.empty(one.shape, device="meta") for name, one in weights.items()}, levels)
        named = in_own_names(dict(given), component, read_json(layout_dir / component / "config.json"))
        assert {name: one.shape for name, one in named.items()} == {name: one.shape for name, one in weights.items()}


def test_an_image_from_files_equals_that_of_the_folder_and_the_revision_differs(
    tiny_folder: Path, tmp_path: Path, tiny_pipeline: ZImagePipeline
) -> None:
    path = saved(single_files(tiny_folder)["vae"]["all in one"], tmp_path / "whole.safetensors")
    bare = tmp_path / "bare"
    for config in tiny_folder.rglob("*.json"):
        target = bare / config.relative_to(tiny_folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(config.read_bytes())
    devices: dict[str, Any] = {"encoder_device": "cpu", "dit_device": "cpu", "vae_device": "cpu"}
    files: dict[str, Any] = {"encoder_weights": path, "dit_weights": path, "vae_weights": path}
    templates = Path(__file__).resolve().parents[3] / "templates" / "z_image"
    pipeline = ZImagePipeline.from_pretrained(bare, torch_dtype="float32", templates_dir=templates, **devices, **files)
    request = GenerationRequest(prompt="a fox", width=64, height=64, steps=2, seed=3)
    assert pipeline.generate(request).images[0].image.tobytes() == (
        tiny_pipeline.generate(request).images[0].image.tobytes()
    )
    described, before = pipeline.describe(), tiny_pipeline.describe()
    assert described["model_revision"] != before["model_revision"]
    assert described["encoder_revision"] != before["encoder_revision"]
    assert revision(bare, IMAGE_COMPONENTS, {"transformer": path}) != revision(bare, IMAGE_COMPONENTS, {"vae": path})


def test_float8_is_multiplied_by_its_scale(tiny_folder: Path, tmp_path: Path) -> None:
    plain = comfy_names(weights_of(tiny_folder, "transformer"))
    name = "layers.0.feed_forward.w1"
    packed = {**plain, "scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn)}
    packed[f"{name}.weight"] = (plain[f"{name}.weight"] / 0.25).to(torch.float8_e4m3fn)
    packed[f"{name}.scale_weight"] = torch.tensor([0.25])
    packed[f"{name}.scale_input"] = torch.tensor([1.0])
    network = load_transformer(tiny_folder, FLOAT32, saved(packed, tmp_path / "fp8.safetensors"))
    expected = packed[f"{name}.weight"].float() * 0.25
    assert torch.equal(network.get_parameter(f"{name}.weight"), expected)


def test_a_scale_for_each_row_is_applied_and_other_counts_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    packed = comfy_names(weights_of(tiny_folder, "transformer"))
    name = "layers.0.feed_forward.w1"
    rows = packed[f"{name}.weight"].shape[0]
    scales = torch.arange(1, rows + 1).float()
    packed[f"{name}.weight"] = torch.ones_like(packed[f"{name}.weight"]).to(torch.float8_e4m3fn)
    network = load_transformer(
        tiny_folder, FLOAT32, saved({**packed, f"{name}.weight_scale": scales}, tmp_path / "rows.safetensors")
    )
    assert torch.equal(network.get_parameter(f"{name}.weight")[:, 0], scales)
    with pytest.raises(CheckpointError, match="must be one scale, or one for each row"):
        load_transformer(
            tiny_folder, FLOAT32, saved({**packed, f"{name}.weight_scale": scales[:3]}, tmp_path / "three.safetensors")
        )


def comfy_mark(kind: str) -> Tensor:
    return torch.tensor(list(msgspec.json.encode({"format": kind})), dtype=torch.uint8)


def test_comfyuis_mark_of_float8_is_supported_and_others_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    plain = comfy_names(weights_of(tiny_folder, "transformer"))
    marked = {**plain, "layers.0.feed_forward.w1.comfy_quant": comfy_mark("float8_e4m3fn")}
    load_transformer(tiny_folder, FLOAT32, saved(marked, tmp_path / "fp8.safetensors"))
    marked["layers.0.feed_forward.w1.comfy_quant"] = comfy_mark("nvfp4")
    with pytest.raises(
        CheckpointError, match=r"w1\.comfy_quant specifies nvfp4; of quantized weights only float8 is supported"
    ):
        load_transformer(tiny_folder, FLOAT32, saved(marked, tmp_path / "nvfp4.safetensors"))
    marked["layers.0.feed_forward.w1.comfy_quant"] = torch.tensor([1, 2, 3], dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=r"w1\.comfy_quant specifies an unreadable format"):
        load_transformer(tiny_folder, FLOAT32, saved(marked, tmp_path / "unread.safetensors"))
    alone = {**plain, "layers.9.scale_weight": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"layers\.9\.scale_weight is a scale without its weight"):
        load_transformer(tiny_folder, FLOAT32, saved(alone, tmp_path / "alone.safetensors"))


def test_incomplete_files_are_refused_by_name(tiny_folder: Path, tmp_path: Path) -> None:
    plain = comfy_names(weights_of(tiny_folder, "transformer"))
    path = tmp_path / "one.safetensors"
    lacking = {name: one for name, one in plain.items() if name != "layers.1.attention.out.weight"}
    with pytest.raises(CheckpointError, match=r"one\.safetensors: missing keys: layers\.1\.attention\.to_out"):
        load_transformer(tiny_folder, FLOAT32, saved(lacking, path))
    with pytest.raises(CheckpointError, match=r"unexpected keys: extra\.weight \(1 in total\)"):
        load_transformer(tiny_folder, FLOAT32, saved({**plain, "extra.weight": torch.ones(1)}, path))
    with pytest.raises(CheckpointError, match=r"mismatched keys: x_pad_token"):
        load_transformer(tiny_folder, FLOAT32, saved({**plain, "x_pad_token": torch.ones(1, 5)}, path))
    for load in LOADERS.values():
        with pytest.raises(CheckpointError, match=r"model_index\.json cannot be read"):
            load(tmp_path, FLOAT32, path)
    hostile = {**plain, "\0\x1b[31m" + "k" * 2_000_000: torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"unexpected keys: \\u0000\\u001b\[31mkkk") as refused:
        load_transformer(tiny_folder, FLOAT32, saved(hostile, path))
    assert len(refused.value.message) < 1000
    path.write_bytes(safetensors_save({"x": torch.ones([1] * 64)}).replace(b'"shape":[1,', b'"shape":[1,1,1,1,1,'))
    with pytest.raises(CheckpointError, match=r"one\.safetensors cannot be read"):
        load_transformer(tiny_folder, FLOAT32, path)
    scalar = {**plain, "layers.0.attention.qkv.weight": torch.tensor(1.0)}
    with pytest.raises(CheckpointError, match=r"one\.safetensors cannot be read"):
        load_transformer(tiny_folder, FLOAT32, saved(scalar, path))
    path.write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match=r"one\.safetensors cannot be read"):
        load_transformer(tiny_folder, FLOAT32, path)
    with pytest.raises(CheckpointError, match=r"nowhere\.safetensors cannot be read"):
        load_transformer(tiny_folder, FLOAT32, tmp_path / "nowhere.safetensors")


def written_gguf(weights: Mapping[str, Tensor], kind: str, path: Path) -> Path:
    """Write a usual GGUF file: the blocks' matrices quantized, others in more bits, everything else in float32.

    As GGUF drops them, leading dimensions of size 1 are missing.
    """
    types = gguf.GGMLQuantizationType
    blocks: dict[str, tuple[np.ndarray, Any]] = {}
    for name, tensor in weights.items():
        numbers = np.ascontiguousarray(tensor.float().numpy())
        numbers = numbers[0] if numbers.shape[0] == 1 else numbers
        in_block = re.search(r"\.attention\.|\.feed_forward\.|\.attn_.\.|\.ffn_(up|down|gate)", name) is not None
        other = types.Q8_0 if "adaLN" in name or name == "token_embd.weight" else types.BF16
        packed = types.F32 if tensor.ndim == 1 else types[kind] if in_block else other
        blocks[name] = (gguf.quantize(numbers, packed), packed)
    return written_blocks(blocks, path)


def written_blocks(blocks: Mapping[str, tuple[np.ndarray, Any]], path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "any")
    for name, (content, packed) in blocks.items():
        writer.add_tensor(name, content, raw_dtype=packed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def velocity(network: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    model = VelocityModel(network, CPU, torch.float32)
    embeds = torch.randn(20, model.prompt_width, generator=generator)
    latents = torch.randn(16, 16, 16, generator=generator)
    with torch.inference_mode():
        return model.velocity(model.plan(embeds, LatentSize(16, 16), [0.8, 0.0]), latents, 0)


def llama_cpp_names(weights: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Return the text encoder under the names that the `gguf` package gives to its tensors."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, layers)
    found = {str(names.get_name(f"model.{name}", (".weight",))): tensor for name, tensor in weights.items()}
    return {**found, "output.weight": torch.ones(2, 32)}


def hidden_state(network: nn.Module) -> Tensor:
    with torch.inference_mode():
        return TextEncoder(network, CPU).encode(range(40, 70), LayerBlend(((-1, 1.0),)))


@pytest.mark.parametrize(("kind", "bound"), [("F32", 0.01), ("BF16", 0.02), ("Q8_0", 0.02), ("Q4_0", 0.3)])
def test_the_text_encoder_is_read_from_gguf_under_the_names_of_llama_cpp(
    demo_folder: Path, tmp_path: Path, kind: str, bound: float
) -> None:
    weights = weights_of(demo_folder, "text_encoder")
    layers = int(read_json(demo_folder / "text_encoder" / "config.json")["num_hidden_layers"])
    path = written_gguf(llama_cpp_names(weights, layers), kind, tmp_path / "encoder.gguf")
    plain, packed = load_text_encoder(demo_folder, FLOAT32), load_text_encoder(demo_folder, FLOAT32, path)
    assert is_packed(packed) == (kind in ("Q8_0", "Q4_0"))
    true = hidden_state(plain)
    assert 0 < float((hidden_state(packed) - true).norm() / true.norm()) < bound


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0"])
def test_leading_dimensions_of_one_may_be_missing_in_gguf(tiny_folder: Path, tmp_path: Path, kind: str) -> None:
    packed = gguf.GGMLQuantizationType[kind]
    weights = weights_of(tiny_folder, "transformer")
    blocks = {name: (one.float().numpy(), gguf.GGMLQuantizationType.F32) for name, one in weights.items()}
    tokens = {
        name: gguf.quantize(weights[name].float().numpy()[0], packed) for name in ("x_pad_token", "cap_pad_token")
    }
    blocks |= {name: (content, packed) for name, content in tokens.items()}
    network = load_transformer(tiny_folder, FLOAT32, written_blocks(blocks, tmp_path / "flat.gguf"))
    for name, content in tokens.items():
        expected = torch.from_numpy(gguf.dequantize(content, packed))[None]
        assert_close_relative(network.get_parameter(name), expected, roundings=HALF if kind == "Q8_0" else 0)


@pytest.mark.parametrize("component", LOADERS)
def test_leading_dimensions_of_one_may_be_missing_in_any_tensor(
    tiny_folder: Path, tmp_path: Path, component: str
) -> None:
    weights = weights_of(tiny_folder, component)
    given = {name: one.reshape([size for size in one.shape if size > 1] or [1]) for name, one in weights.items()}
    given = {
        name: flat if one.shape[0] == 1 else one
        for (name, one), flat in zip(weights.items(), given.values(), strict=True)
    }
    network = LOADERS[component](tiny_folder, FLOAT32, saved(given, tmp_path / "flat.safetensors"))
    assert all(torch.equal(one, weights[name]) for name, one in network.named_parameters())


KINDS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_every_kind_mean_what_the_gguf_package_reads(demo_folder: Path, tmp_path: Path, kind: str) -> None:
    """No package writes K kinds, so the blocks are random bits, with scales of about 1."""
    packed = gguf.GGMLQuantizationType[kind]
    weights = comfy_names(weights_of(demo_folder, "transformer"))
    name = next(name for name, one in weights.items() if "feed_forward" in name and one.shape[1] % 256 == 0)
    size, size_bytes = gguf.GGML_QUANT_SIZES[packed]
    rows, columns = weights[name].shape
    content = np.random.default_rng(1).integers(0, 256, (rows, columns // size, size_bytes), dtype=np.uint8)
    scales = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(kind, (0, 2) if kind[-1] in "1K" else (0,))
    for first in scales:
        content[..., first : first + 2] = np.frombuffer(np.float16(0.75).tobytes(), np.uint8)
    content = content.reshape(rows, -1)
    blocks = {one: (tensor.float().numpy(), gguf.GGMLQuantizationType.F32) for one, tensor in weights.items()}
    path = written_blocks({**blocks, name: (content, packed)}, tmp_path / "one.gguf")
    layer = load_transformer(demo_folder, FLOAT32, path).get_submodule(name.removesuffix(".weight"))
    assert layer.weight.quant_type == packed
    expected = torch.from_numpy(gguf.dequantize(content, packed)).T
    found = layer(torch.eye(columns))
    assert_close_relative(found, expected, roundings=4 * HALF)


@pytest.mark.parametrize("kind", GGUF_ERROR)
def test_gguf_stays_quantized_and_computes_nearly_the_same(demo_folder: Path, tmp_path: Path, kind: str) -> None:
    path = written_gguf(comfy_names(weights_of(demo_folder, "transformer")), kind, tmp_path / "one.gguf")
    plain, packed = load_transformer(demo_folder, FLOAT32), load_transformer(demo_folder, FLOAT32, path)
    assert is_packed(packed)
    assert not is_packed(plain)
    weight: Any = packed.get_parameter("layers.0.attention.to_q.weight")
    assert weight.quant_type.name == kind
    true = velocity(plain)
    error = float((velocity(packed) - true).norm() / true.norm())
    assert 0 < error < GGUF_ERROR[kind]


def test_loras_work_with_gguf_without_being_fused(demo_folder: Path, tmp_path: Path) -> None:
    path = written_gguf(comfy_names(weights_of(demo_folder, "transformer")), "Q8_0", tmp_path / "one.gguf")
    lora = demo_folder.parent / "loras" / "demo-night.safetensors"
    devices: dict[str, Any] = {"encoder_device": "cpu", "dit_device": "cpu", "vae_device": "cpu", "dit_weights": path}
    pipeline = ZImagePipeline.from_pretrained(demo_folder, torch_dtype="float32", **devices)
    always = ZImagePipeline.from_pretrained(demo_folder, torch_dtype="float32", fused_loras=[(lora, 1.0)], **devices)
    request = GenerationRequest(prompt="a red star", width=64, height=64, steps=2, seed=3)
    plain = pipeline.generate(request).images[0].image
    asked = GenerationRequest(**{**msgspec.structs.asdict(request), "loras": (LoraUse(name="night", scale=1.0),)})
    with_lora = pipeline.generate(asked, inputs=Inputs(loras={"night": pipeline.load_lora(lora)})).images[0].image
    assert with_lora.tobytes() != plain.tobytes()
    assert always.generate(request).images[0].image.tobytes() == with_lora.tobytes()

    def twice(generator: ZImagePipeline, *, scale: float) -> bytes:
        inputs = Inputs(loras={"night": generator.load_lora(lora)})
        wanted = msgspec.structs.replace(asked, loras=(LoraUse(name="night", scale=scale),))
        return generator.generate(wanted, inputs=inputs).images[0].image.tobytes()

    # The request's LoRA is added to the fused one, and cancels it.
    undone = np.frombuffer(twice(always, scale=-1.0), np.uint8)
    assert_levels_close(undone, np.frombuffer(plain.tobytes(), np.uint8))


@pytest.mark.parametrize("unit", ["network", "block"])
def test_gguf_is_offloaded_without_dequantizing(
    demo_folder: Path, tmp_path: Path, unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "useful_offload", lambda _device, offload: offload)
    path = written_gguf(comfy_names(weights_of(demo_folder, "transformer")), "Q4_0", tmp_path / "one.gguf")
    devices: dict[str, Any] = {"encoder_device": "cpu", "dit_device": "cpu", "vae_device": "cpu", "dit_weights": path}
    resident = ZImagePipeline.from_pretrained(demo_folder, torch_dtype="float32", **devices)
    offloaded = ZImagePipeline.from_pretrained(
        demo_folder, torch_dtype="float32", cpu_offload=True, cpu_offload_unit=unit, **devices
    )
    request = GenerationRequest(prompt="a red star", width=64, height=64, steps=2, seed=3)
    assert offloaded.generate(request).images[0].image.tobytes() == resident.generate(request).images[0].image.tobytes()


@pytest.mark.parametrize("endianness", gguf.GGUFEndian)
@pytest.mark.parametrize("values", [[1, 2, 3], ["a", "b", "c"], [0.5, 1.5, 2.5]])
def test_an_array_in_gguf_that_is_longer_than_the_file_is_refused(
    demo_folder: Path, tmp_path: Path, values: list[Any], endianness: gguf.GGUFEndian
) -> None:
    """The `gguf` package writes the file and would read the damaged array of numbers practically forever."""
    path = tmp_path / "one.gguf"
    writer = gguf.GGUFWriter(path, "any", endianess=endianness)
    writer.add_array("some.values", values)
    writer.add_bool("some.flag", True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    check_metadata_ends(path)
    content = path.read_bytes()
    order = "<" if endianness is gguf.GGUFEndian.LITTLE else ">"
    count_at = content.index(b"some.values") + len(b"some.values") + 8  # after the types of the value and its items
    assert struct.unpack_from(f"{order}Q", content, count_at) == (3,)
    path.write_bytes(content[:count_at] + struct.pack(f"{order}Q", 2**62) + content[count_at + 8 :])
    with pytest.raises(CheckpointError, match=r"one\.gguf cannot be read as GGUF: its metadata .*"):
        load_transformer(demo_folder, FLOAT32, path)


def test_gguf_is_refused_if_it_cannot_be_used(tiny_folder: Path, demo_folder: Path, tmp_path: Path) -> None:
    path = written_gguf(comfy_names(weights_of(demo_folder, "transformer")), "Q8_0", tmp_path / "one.gguf")
    with pytest.raises(CheckpointError, match="GGUF is supported for the transformer and the text encoder, not for"):
        load_vae(demo_folder, FLOAT32, path)
    with pytest.raises(CheckpointError, match="holds quantized weights; set quantization to none to use it"):
        load_transformer(demo_folder, Placement(CPU, torch.float32, "8bit"), path)
    with pytest.raises(CheckpointError, match="keys: "):
        load_transformer(tiny_folder, FLOAT32, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"one\.gguf cannot be read as GGUF"):
        load_transformer(demo_folder, FLOAT32, path)
    path.write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"one\.gguf cannot be read as GGUF"):
        load_transformer(demo_folder, FLOAT32, path)
    with pytest.raises(CheckpointError, match=r"nowhere\.gguf cannot be read as GGUF"):
        load_transformer(demo_folder, FLOAT32, tmp_path / "nowhere.gguf")

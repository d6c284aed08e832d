"""Weights out of single files, in whatever layout, are those of the folder; what is not whole is refused."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zcore.errors import CheckpointError
from zcore.imaging.geometry import LatentSize
from zcore.imaging.inputs import Inputs
from zcore.imaging.model import loader
from zcore.imaging.model.checkpoint import PAINTING, read_json, revision
from zcore.imaging.model.loader import Placement, build_meta, load_text_encoder, load_transformer, load_vae
from zcore.imaging.model.quantization import is_packed
from zcore.imaging.model.single_file import in_own_names
from zcore.imaging.model.transformer import VelocityModel
from zcore.imaging.pipeline import ZImagePipeline
from zcore.request import GenerationRequest, LoraUse

CPU = torch.device("cpu")
FLOAT32 = Placement(CPU, torch.float32)
LOADERS: dict[str, Any] = {"text_encoder": load_text_encoder, "transformer": load_transformer, "vae": load_vae}
FILES = {
    "text_encoder": "model.safetensors",
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
GGUF_ERROR = {"Q8_0": 0.01, "Q5_1": 0.04, "Q4_0": 0.1}
"""Relative error of the demo model's velocity."""


def weights_of(folder: Path, component: str) -> dict[str, Tensor]:
    """As the checkpoint has them."""
    return load_file(folder / component / FILES[component])


def comfy_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The transformer as ComfyUI has it: one matrix for queries, keys and values, and shorter names."""
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
    """The VAE as latent diffusion has it: levels counted from the outside, attention as convolutions of one pixel."""
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
    """By component and layout, what a file holds."""
    transformer, encoder, vae = (weights_of(folder, name) for name in ("transformer", "text_encoder", "vae"))
    levels = len(read_json(folder / "vae" / "config.json")["up_block_types"])

    def behind(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {f"{prefix}{name}": tensor for name, tensor in weights.items()}

    whole = {
        **behind("model.diffusion_model.", comfy_names(transformer)),
        **behind("text_encoders.qwen3_4b.transformer.model.", encoder),
        **behind("vae.", original_vae(vae, levels)),
    }
    return {
        "transformer": {
            "diffusers": dict(transformer),
            "ComfyUI": comfy_names(transformer),
            "ComfyUI with a prefix": behind("diffusion_model.", comfy_names(transformer)),
            "all in one": whole,
        },
        "text_encoder": {
            "transformers": dict(encoder),
            "with its head": {**behind("model.", encoder), "lm_head.weight": torch.ones(2, 2)},
            "all in one": whole,
        },
        "vae": {
            "diffusers": dict(vae),
            "latent diffusion": original_vae(vae, levels),
            "latent diffusion with a prefix": behind("first_stage_model.", original_vae(vae, levels)),
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
def test_a_network_out_of_a_file_is_that_of_the_folder_bit_for_bit(
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
    """With tensors of the real shapes that hold one number each."""
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


def test_a_picture_from_files_is_that_of_the_folder_and_the_files_can_be_told_apart(
    tiny_folder: Path, tmp_path: Path, tiny_pipeline: ZImagePipeline
) -> None:
    path = saved(single_files(tiny_folder)["vae"]["all in one"], tmp_path / "whole.safetensors")
    bare = tmp_path / "bare"
    for config in tiny_folder.rglob("*.json"):
        place = bare / config.relative_to(tiny_folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(config.read_bytes())
    devices: dict[str, Any] = {"encoder_device": "cpu", "dit_device": "cpu", "vae_device": "cpu"}
    files: dict[str, Any] = {"encoder_weights": path, "dit_weights": path, "vae_weights": path}
    templates = Path(__file__).resolve().parents[3] / "templates" / "z_image"
    pipeline = ZImagePipeline.from_pretrained(bare, torch_dtype="float32", templates_dir=templates, **devices, **files)
    request = GenerationRequest(prompt="a fox", width=64, height=64, steps=2, seed=3)
    assert pipeline.generate(request).images[0].image.tobytes() == (
        tiny_pipeline.generate(request).images[0].image.tobytes()
    )
    told, before = pipeline.describe(), tiny_pipeline.describe()
    assert told["model_revision"] != before["model_revision"]
    assert told["encoder_revision"] != before["encoder_revision"]
    assert revision(bare, PAINTING, {"transformer": path}) != revision(bare, PAINTING, {"vae": path})


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


def test_a_scale_for_each_row_is_that_of_its_row_and_any_other_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    packed = comfy_names(weights_of(tiny_folder, "transformer"))
    name = "layers.0.feed_forward.w1"
    rows = packed[f"{name}.weight"].shape[0]
    scales = torch.arange(1, rows + 1).float()
    packed[f"{name}.weight"] = torch.ones_like(packed[f"{name}.weight"]).to(torch.float8_e4m3fn)
    network = load_transformer(
        tiny_folder, FLOAT32, saved({**packed, f"{name}.weight_scale": scales}, tmp_path / "rows.safetensors")
    )
    assert torch.equal(network.get_parameter(f"{name}.weight")[:, 0], scales)
    with pytest.raises(CheckpointError, match="is neither one scale nor one for each row"):
        load_transformer(
            tiny_folder, FLOAT32, saved({**packed, f"{name}.weight_scale": scales[:3]}, tmp_path / "three.safetensors")
        )


def comfy_mark(kind: str) -> Tensor:
    return torch.tensor(list(msgspec.json.encode({"format": kind})), dtype=torch.uint8)


def test_comfys_own_mark_of_float8_is_understood_and_any_other_refused(tiny_folder: Path, tmp_path: Path) -> None:
    plain = comfy_names(weights_of(tiny_folder, "transformer"))
    marked = {**plain, "layers.0.feed_forward.w1.comfy_quant": comfy_mark("float8_e4m3fn")}
    load_transformer(tiny_folder, FLOAT32, saved(marked, tmp_path / "fp8.safetensors"))
    marked["layers.0.feed_forward.w1.comfy_quant"] = comfy_mark("nvfp4")
    with pytest.raises(CheckpointError, match=r"w1\.comfy_quant says nvfp4; of packed weights only float8 is read"):
        load_transformer(tiny_folder, FLOAT32, saved(marked, tmp_path / "nvfp4.safetensors"))
    marked["layers.0.feed_forward.w1.comfy_quant"] = torch.tensor([1, 2, 3], dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=r"w1\.comfy_quant says nothing that can be read"):
        load_transformer(tiny_folder, FLOAT32, saved(marked, tmp_path / "unread.safetensors"))
    alone = {**plain, "layers.9.scale_weight": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"layers\.9\.scale_weight is the scale of no weight"):
        load_transformer(tiny_folder, FLOAT32, saved(alone, tmp_path / "alone.safetensors"))


def test_what_is_not_whole_is_refused_by_name(tiny_folder: Path, tmp_path: Path) -> None:
    plain = comfy_names(weights_of(tiny_folder, "transformer"))
    path = tmp_path / "one.safetensors"
    lacking = {name: one for name, one in plain.items() if name != "layers.1.attention.out.weight"}
    with pytest.raises(CheckpointError, match=r"one\.safetensors: missing keys: layers\.1\.attention\.to_out"):
        load_transformer(tiny_folder, FLOAT32, saved(lacking, path))
    with pytest.raises(CheckpointError, match=r"unexpected keys: extra\.weight \(1 in all\)"):
        load_transformer(tiny_folder, FLOAT32, saved({**plain, "extra.weight": torch.ones(1)}, path))
    with pytest.raises(CheckpointError, match=r"mismatched keys: x_pad_token"):
        load_transformer(tiny_folder, FLOAT32, saved({**plain, "x_pad_token": torch.ones(1, 5)}, path))
    for load in LOADERS.values():
        with pytest.raises(CheckpointError, match=r"model_index\.json cannot be read"):
            load(tmp_path, FLOAT32, path)
    path.write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match=r"one\.safetensors cannot be read"):
        load_transformer(tiny_folder, FLOAT32, path)
    with pytest.raises(CheckpointError, match=r"nowhere\.safetensors cannot be read"):
        load_transformer(tiny_folder, FLOAT32, tmp_path / "nowhere.safetensors")


def written_gguf(weights: Mapping[str, Tensor], kind: str, path: Path) -> Path:
    """As such files are: the blocks' matrices packed, others in more bits, all that is no matrix in float32."""
    writer = gguf.GGUFWriter(path, "lumina2")
    types = gguf.GGMLQuantizationType
    for name, tensor in weights.items():
        numbers = tensor.float().numpy()
        if tensor.ndim == 2:
            in_block = ".attention." in name or ".feed_forward." in name
            packed = types[kind] if in_block else types.Q8_0 if "adaLN" in name else types.BF16
            writer.add_tensor(name, gguf.quantize(numbers, packed), raw_dtype=packed)
        else:
            writer.add_tensor(name, np.ascontiguousarray(numbers))
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


@pytest.mark.parametrize("kind", GGUF_ERROR)
def test_gguf_stays_packed_and_computes_nearly_the_same(demo_folder: Path, tmp_path: Path, kind: str) -> None:
    path = written_gguf(comfy_names(weights_of(demo_folder, "transformer")), kind, tmp_path / "one.gguf")
    plain, packed = load_transformer(demo_folder, FLOAT32), load_transformer(demo_folder, FLOAT32, path)
    assert is_packed(packed)
    assert not is_packed(plain)
    weight: Any = packed.get_parameter("layers.0.attention.to_q.weight")
    assert weight.quant_type.name == kind
    true = velocity(plain)
    error = float((velocity(packed) - true).norm() / true.norm())
    assert 0 < error < GGUF_ERROR[kind]


def test_loras_go_beside_gguf_and_cannot_be_fused_into_it(demo_folder: Path, tmp_path: Path) -> None:
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

    def twice(painter: ZImagePipeline, *, scale: float) -> bytes:
        inputs = Inputs(loras={"night": painter.load_lora(lora)})
        wanted = msgspec.structs.replace(asked, loras=(LoraUse(name="night", scale=scale),))
        return painter.generate(wanted, inputs=inputs).images[0].image.tobytes()

    undone = np.frombuffer(twice(always, scale=-1.0), np.uint8).astype(int)
    assert np.abs(undone - np.frombuffer(plain.tobytes(), np.uint8)).max() <= 1, "the request's own acts beside it"


@pytest.mark.parametrize("unit", ["network", "block"])
def test_gguf_rests_and_comes_packed(
    demo_folder: Path, tmp_path: Path, unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "useful_offload", lambda _device, offload: offload)
    path = written_gguf(comfy_names(weights_of(demo_folder, "transformer")), "Q4_0", tmp_path / "one.gguf")
    devices: dict[str, Any] = {"encoder_device": "cpu", "dit_device": "cpu", "vae_device": "cpu", "dit_weights": path}
    stays = ZImagePipeline.from_pretrained(demo_folder, torch_dtype="float32", **devices)
    comes = ZImagePipeline.from_pretrained(
        demo_folder, torch_dtype="float32", cpu_offload=True, cpu_offload_unit=unit, **devices
    )
    request = GenerationRequest(prompt="a red star", width=64, height=64, steps=2, seed=3)
    assert comes.generate(request).images[0].image.tobytes() == stays.generate(request).images[0].image.tobytes()


def test_gguf_is_refused_where_it_cannot_be_read(tiny_folder: Path, demo_folder: Path, tmp_path: Path) -> None:
    path = written_gguf(comfy_names(weights_of(demo_folder, "transformer")), "Q8_0", tmp_path / "one.gguf")
    with pytest.raises(CheckpointError, match="GGUF is read for the transformer alone, not for the vae"):
        load_vae(demo_folder, FLOAT32, path)
    with pytest.raises(CheckpointError, match="holds packed weights; with it, quantization has to be none"):
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

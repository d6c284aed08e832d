"""A checkpoint loads completely or not at all, and the error names what is wrong."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from zcore.checkpoint.files import IMAGE_COMPONENTS, PROMPT_COMPONENTS, check_layout, encoder_family, locate, revision
from zcore.checkpoint.scheduler import default_shift
from zcore.errors import CheckpointError, InvalidRequest
from zcore.imaging.kernels.attention import choose_attention
from zcore.imaging.pipeline import ZImagePipeline
from zcore.imaging.prompt_encoder import PromptEncoder
from zcore.imaging.weights.loader import (
    Placement,
    device_of,
    dtype_of,
    transformer_placement,
    vae_placement,
)

CPU = torch.device("cpu")


@pytest.fixture
def checkpoint(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "checkpoint"))


def load(folder: Path | str, **options: Any) -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(folder, torch_dtype="float32", dit_device="cpu", **options)


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"/no/such/folder is neither a folder nor a Hugging Face model name"):
        load("/no/such/folder")


def test_a_hub_id_that_is_not_cached_fails_offline_in_one_line() -> None:
    with pytest.raises(
        CheckpointError,
        match=r"model_path: nobody/nothing is not a folder and cannot be loaded from the Hugging Face hub: .",
    ) as failure:
        load("nobody/nothing")
    assert "\n" not in failure.value.message


def test_a_folder_is_used_directly(checkpoint: Path) -> None:
    assert locate(str(checkpoint), IMAGE_COMPONENTS) == checkpoint


@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ],
)
def test_a_missing_file_is_named(checkpoint: Path, file: str) -> None:
    (checkpoint / file).unlink()
    with pytest.raises(CheckpointError, match=re.escape(str(checkpoint / file))):
        load(checkpoint)


def test_the_real_layout_without_its_weights_is_missing_its_first_shard(layout_dir: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model-00001-of-00003\.safetensors is missing"):
        check_layout(layout_dir, ["text_encoder"])


@pytest.mark.parametrize("component", ["text_encoder", "transformer", "vae", "scheduler"])
def test_an_unsupported_class_is_refused_by_name(checkpoint: Path, component: str) -> None:
    change_json(checkpoint / "model_index.json", lambda index: index.update({component: ["diffusers", "FluxThing"]}))
    with pytest.raises(CheckpointError, match=f"{component} is FluxThing; it must be"):
        load(checkpoint)


def test_a_text_encoder_of_another_kind_is_refused(checkpoint: Path) -> None:
    (checkpoint / "text_encoder" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"text_encoder/config\.json: model_type must be qwen3"):
        load(checkpoint)


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
@pytest.mark.parametrize("fault", ["missing", "mismatched", "unexpected"])
def test_weights_that_do_not_fit_are_named_and_never_random(checkpoint: Path, component: str, fault: str) -> None:
    (file,) = (checkpoint / component).glob("*.safetensors")
    weights = load_file(file)
    name = sorted(weights)[0]
    if fault == "missing":
        del weights[name]
    elif fault == "mismatched":
        weights[name] = torch.cat([weights[name], weights[name]])
    else:
        name = "layers.99.stray.weight"
        weights[name] = torch.zeros(3)
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")) as failure:
        load(checkpoint)
    assert component in failure.value.message


def test_a_truncated_weight_file_is_named(checkpoint: Path) -> None:
    file = checkpoint / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"transformer/diffusion_pytorch_model\.safetensors cannot be read"):
        load(checkpoint)


def test_a_layer_that_the_text_encoder_lacks_is_named(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="hidden_layer: -9"):
        load(checkpoint, hidden_layer=-9)


def test_the_revision_depends_on_the_content_and_not_on_the_folder(tiny_folder: Path, checkpoint: Path) -> None:
    assert revision(checkpoint, IMAGE_COMPONENTS) == revision(tiny_folder, IMAGE_COMPONENTS)
    assert len(revision(checkpoint, IMAGE_COMPONENTS)) == 16
    file = checkpoint / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({name: weight + 1 for name, weight in weights.items()}, file, {"format": "pt"})
    assert revision(checkpoint, IMAGE_COMPONENTS) != revision(tiny_folder, IMAGE_COMPONENTS)
    assert revision(checkpoint, PROMPT_COMPONENTS) == revision(tiny_folder, PROMPT_COMPONENTS)


def test_the_default_shift_is_the_schedulers(checkpoint: Path) -> None:
    assert default_shift(checkpoint) == 3.0
    path = checkpoint / "scheduler" / "scheduler_config.json"
    for content in ("{}", '{"shift": "3"}', '{"shift": true}', '{"shift": null}'):
        path.write_text(content)
        with pytest.raises(CheckpointError, match=r"scheduler/scheduler_config\.json: shift must be a number"):
            default_shift(checkpoint)


def test_a_prompt_encoder_needs_the_text_encoders_weights_and_no_others(checkpoint: Path) -> None:
    for component in ("transformer", "vae"):
        (checkpoint / component / "diffusion_pytorch_model.safetensors").unlink()
    assert PromptEncoder.from_pretrained(checkpoint, device="cpu").encode("a fox").embeds.shape[1] == 64
    with pytest.raises(CheckpointError, match=r"transformer/diffusion_pytorch_model\.safetensors is missing"):
        load(checkpoint)


def test_a_generator_needs_no_weights_of_the_text_encoder(checkpoint: Path) -> None:
    (checkpoint / "text_encoder" / "model.safetensors").unlink()
    generator = ZImagePipeline.from_pretrained_generator_only(checkpoint, torch_dtype="float32", dit_device="cpu")
    with pytest.raises(InvalidRequest, match="embeddings: must be passed"):
        generator("a fox", width=64, height=64)


def test_an_encoders_family_needs_no_weights_and_follows_its_architecture_and_tokenizer(
    tiny_folder: Path, demo_folder: Path, checkpoint: Path
) -> None:
    for weights in (checkpoint / "text_encoder").glob("*.safetensors"):
        weights.unlink()
    family = encoder_family(checkpoint)
    assert family == encoder_family(tiny_folder) != encoder_family(demo_folder)
    assert re.fullmatch("[0-9a-f]{64}", family)
    for file in ("text_encoder/config.json", "tokenizer/tokenizer.json"):
        change_json(checkpoint / file, lambda content: content.update(changed=True))
        family, before = encoder_family(checkpoint), family
        assert family != before
    (checkpoint / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer/tokenizer\.json cannot be read: No such file"):
        encoder_family(checkpoint)


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "xpu", "meta", "", "mps", "cuda", "cuda:7"])
def test_an_unavailable_device_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(CheckpointError, match="device: "):
        device_of(name)


def test_auto_is_the_cpu_if_there_is_no_other_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert device_of("auto") == device_of("cpu") == CPU


def test_a_dtype_is_given_by_name_or_directly() -> None:
    assert dtype_of("bfloat16") == dtype_of(torch.bfloat16) == torch.bfloat16
    for unknown in ("float8", "int8", torch.int8):
        with pytest.raises(CheckpointError, match="torch_dtype"):
            dtype_of(unknown)


def test_the_transformer_never_runs_in_float16(tiny_folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"float16 .* black images; use bfloat16 or float32"):
        ZImagePipeline.from_pretrained(tiny_folder, torch_dtype=torch.float16)
    assert transformer_placement(CPU, torch.bfloat16) == Placement(CPU, torch.bfloat16)


def test_the_vae_decodes_in_float32_if_the_checkpoint_or_a_cpu_requires_it(checkpoint: Path) -> None:
    gpu = torch.device("cuda")
    assert vae_placement(checkpoint, gpu, torch.bfloat16).dtype == torch.float32
    change_json(checkpoint / "vae" / "config.json", lambda config: config.update(force_upcast=False))
    assert vae_placement(checkpoint, gpu, torch.bfloat16).dtype == torch.bfloat16
    assert vae_placement(checkpoint, CPU, torch.bfloat16).dtype == torch.float32


@pytest.mark.parametrize(
    ("backend", "package"),
    [
        ("flash_attn_3", "flash_attn_interface"),
        ("flash_attn_2", "flash_attn"),
        ("sage", "sageattention"),
        ("xformers", "xformers"),
    ],
)
def test_an_attention_backend_without_its_package_is_refused(backend: str, package: str) -> None:
    with pytest.raises(CheckpointError, match=f"attention_backend: {backend} needs the package {package}"):
        choose_attention(backend, Placement(CPU, torch.bfloat16))


def test_an_attention_backend_that_does_not_exist_is_refused() -> None:
    with pytest.raises(
        CheckpointError, match="attention_backend: flash is not supported; use one of auto, flash_attn_3"
    ):
        choose_attention("flash", Placement(CPU, torch.bfloat16))


@pytest.mark.parametrize(
    ("backend", "placement", "complaint"),
    [
        ("flash_attn_2", Placement(CPU, torch.bfloat16), "needs a CUDA device"),
        ("flash_attn_2", Placement(torch.device("cuda"), torch.float32), "computes in bfloat16"),
        ("flash_attn_3", Placement(torch.device("cuda"), torch.bfloat16), "Hopper"),
    ],
)
def test_an_installed_backend_that_cannot_run_here_says_why(
    monkeypatch: pytest.MonkeyPatch, backend: str, placement: Placement, complaint: str
) -> None:
    install_every_kernel(monkeypatch, capability=(8, 9))
    with pytest.raises(CheckpointError, match=f"attention_backend: {backend} .*{complaint}"):
        choose_attention(backend, placement)


@pytest.mark.parametrize(
    ("capability", "dtype", "chosen"),
    [
        ((9, 0), torch.bfloat16, "flash_attn_3"),
        ((8, 9), torch.bfloat16, "flash_attn_2"),
        ((7, 5), torch.bfloat16, "sdpa"),
        ((9, 0), torch.float32, "sdpa"),
    ],
)
def test_auto_chooses_the_fastest_exact_backend_that_can_run(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype, chosen: str
) -> None:
    install_every_kernel(monkeypatch, capability)
    assert choose_attention("auto", Placement(torch.device("cuda"), dtype)) == chosen
    assert choose_attention("auto", Placement(CPU, dtype)) == "sdpa"


def install_every_kernel(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """Pretend to be on a machine with a GPU of this generation and all packages."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _package: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)


def change_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))

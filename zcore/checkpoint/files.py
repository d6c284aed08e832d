"""A checkpoint's folder: where it is, whether it is complete, and which one it is.

Takes a folder in the diffusers layout or the id of one on the Hugging Face hub. Reads configurations and looks at
files; loads no weights and needs no torch.
"""

import hashlib
import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from zcore.errors import CheckpointError
from zcore.foreign_text import first_line
from zcore.safetensors_header import InvalidSafetensors, read_safetensors_header

Component = Literal["text_encoder", "transformer", "vae"]
"""The parts of a checkpoint that have weights."""

GGUF_SUFFIX = ".gguf"

UNKNOWN_MODEL = "is neither a folder nor a Hugging Face model name"

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")

CLASSES = {
    "text_encoder": ("Qwen3Model", "Qwen3ForCausalLM"),
    "transformer": ("ZImageTransformer2DModel",),
    "vae": ("AutoencoderKL",),
    "scheduler": ("FlowMatchEulerDiscreteScheduler",),
}
"""The supported classes of each component."""

WEIGHTS = {
    "text_encoder": "model.safetensors",
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
"""The file of a component's weights. The file with `.index.json` appended lists its shards, if there are any."""

PROMPT_COMPONENTS = ("text_encoder", "tokenizer")
"""The components that determine a prompt's embedding."""

IMAGE_COMPONENTS = ("transformer", "vae", "scheduler")
"""The components that determine an image, given its embedding."""

FINGERPRINT_BYTES = 1024 * 1024


class _ShardIndex(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


def locate(model_path: str, components: Sequence[str]) -> Path:
    """Return a checkpoint's folder, given a folder or a hub id.

    Downloads a hub id first, or finds it in the cache if `HF_HUB_OFFLINE` is set. Fetches the weights of `components`
    and all configurations. Raises `CheckpointError`.
    """
    folder = Path(model_path)
    if folder.is_dir():
        return folder
    if not is_hub_id(model_path):
        raise CheckpointError(f"model_path: {model_path} {UNKNOWN_MODEL}")
    patterns = ["*.json", "tokenizer/*", *(f"{name}/*" for name in components)]
    try:
        return _hub_snapshot(model_path, allow_patterns=patterns)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise CheckpointError(
            f"model_path: {model_path} is not a folder and cannot be loaded from the Hugging Face hub: {reason}"
        ) from error


def locate_local(model_path: str) -> Path | None:
    """Return the folder of a checkpoint that is on this machine, or None. Downloads nothing."""
    folder = Path(model_path)
    if folder.is_dir():
        return folder
    if not is_hub_id(model_path):
        return None
    try:
        return _hub_snapshot(model_path, local_files_only=True)
    except (OSError, ValueError):
        return None


def is_hub_id(model_path: str) -> bool:
    """Return whether this has the form `owner/name`, neither part beginning with a dot, as in `./folder`."""
    return _HUB_ID.fullmatch(model_path) is not None


def check_layout(folder: Path, components: Sequence[str]) -> None:
    """Raise `CheckpointError` for an unsupported class, or if a file of these components is missing.

    The configuration of every component must be present, wherever its weights are.
    """
    index = read_json(folder / "model_index.json")
    for component, classes in CLASSES.items():
        _library, named = index.get(component) or (None, None)
        if named not in classes:
            raise CheckpointError(f"{folder / 'model_index.json'}: {component} is {named}; it must be {classes[0]}")
    expected = [folder / "scheduler" / "scheduler_config.json", folder / "tokenizer" / "tokenizer.json"]
    expected += [folder / component / "config.json" for component in WEIGHTS]
    for component in components:
        expected += weight_files(folder, component)
    for path in expected:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
    config = folder / "text_encoder" / "config.json"
    if read_json(config).get("model_type") != "qwen3":
        # transformers fills an empty configuration with its own defaults: a network of eight billion parameters.
        raise CheckpointError(f"{config}: model_type must be qwen3")


def check_complete(folder: Path, components: Sequence[str]) -> None:
    """Run `check_layout`, and check that each weight file is as long as its header specifies.

    After an interrupted download it is shorter. Reads no weights. Raises `CheckpointError`.
    """
    check_layout(folder, components)
    for component in components:
        for path in weight_files(folder, component):
            try:
                read_safetensors_header(path)
            except InvalidSafetensors as error:
                raise CheckpointError(f"{path} {error}") from error
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def revision(folder: Path, components: Sequence[str], files: Mapping[str, Path] | None = None) -> str:
    """Identify weights by 16 hexadecimal digits of the SHA-256 of their files' paths, sizes, and first MiB.

    `files` are single files that replace components' weights. The first MiB holds a weight file's list of tensors and
    some of their values, so two trainings differ, and 32 GB need not be read.
    """
    digest, single = hashlib.sha256(), files or {}
    of_folder = (path for component in components for path in (folder / component).iterdir())
    named = [
        (path.relative_to(folder).as_posix(), path)
        for path in sorted(of_folder)
        if path.suffix == ".json" or (path.suffix == ".safetensors" and path.parent.name not in single)
    ]
    named += [(f"{component}: {path.name}", path) for component, path in sorted(single.items())]
    for name, path in named:
        with path.open("rb") as file:
            digest.update(f"{name}\0{path.stat().st_size}\0".encode())
            digest.update(file.read(FINGERPRINT_BYTES))
    return digest.hexdigest()[:16]


def encoder_family(folder: Path) -> str:
    """Identify the text encoder that a checkpoint's embeddings come from by a SHA-256 in hexadecimal.

    It covers the encoder's configuration and the tokenizer, which every installation has, including one without the
    encoder's weights. Trainings with the same architecture and tokenizer are one family. Raises `CheckpointError` if a
    file is missing.
    """
    digest = hashlib.sha256()
    for path in (folder / "text_encoder" / "config.json", folder / "tokenizer" / "tokenizer.json"):
        try:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def weight_files(folder: Path, component: str) -> list[Path]:
    """Return the file of a component's weights, or the shards that its index names. Raises `CheckpointError`."""
    path = folder / component / WEIGHTS[component]
    index = path.with_name(f"{path.name}.index.json")
    if not index.is_file():
        return [path]
    try:
        shards = msgspec.convert(read_json(index), _ShardIndex).weight_map
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{index}: {error}") from error
    return sorted({path.with_name(shard) for shard in shards.values()})


def read_json(path: Path) -> dict[str, Any]:
    """Read one of the checkpoint's configurations. Raises `CheckpointError` naming the file."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _hub_snapshot(model_id: str, **options: Any) -> Path:
    # Imported here, because a checkpoint in a local folder does not need it.
    return Path(importlib.import_module("huggingface_hub").snapshot_download(model_id, **options))

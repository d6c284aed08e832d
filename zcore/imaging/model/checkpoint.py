"""A checkpoint's folder: where it is, whether all of it is there, and which one it is.

Takes a folder in the diffusers layout, or the id of one on the Hugging Face hub; gives its path, or a
`CheckpointError` that names what is missing. Needs no torch. Reads configurations and looks at files; does not load a
weight.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import msgspec

from zcore.errors import CheckpointError, FieldError, InvalidRequest
from zcore.request import GenerationRequest, said_everywhere

Component = Literal["text_encoder", "transformer", "vae"]
"""The parts of a checkpoint that have weights."""

GGUF_SUFFIX = ".gguf"

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
CLASSES = {
    "text_encoder": ("Qwen3Model", "Qwen3ForCausalLM"),
    "transformer": ("ZImageTransformer2DModel",),
    "vae": ("AutoencoderKL",),
    "scheduler": ("FlowMatchEulerDiscreteScheduler",),
}
"""The classes that this engine can run, by component."""

WEIGHTS = {
    "text_encoder": "model.safetensors",
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
"""The file of a component's weights; with `.index.json` behind it, the list of its shards."""

ENCODING = ("text_encoder", "tokenizer")
"""What an embedding follows from."""

PAINTING = ("transformer", "vae", "scheduler")
"""What a picture follows from, beside an embedding."""

FINGERPRINT_BYTES = 1024 * 1024

LONGEST_HEADER_BYTES = 100_000_000
"""As the safetensors library has it."""


class _ShardIndex(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


def locate(model_path: str, components: Sequence[str]) -> Path:
    """The folder of a checkpoint. A hub id is downloaded first, or found in the cache when `HF_HUB_OFFLINE` is set.

    Of other than these components only the configurations are fetched.
    """
    folder = Path(model_path)
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(model_path):
        raise CheckpointError(f"model_path: {model_path} is not a folder")
    import huggingface_hub

    patterns = ["*.json", "tokenizer/*", *(f"{name}/*" for name in components)]
    try:
        return Path(cast(Any, huggingface_hub).snapshot_download(model_path, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"model_path: {model_path} is no folder, nor on the hub: {reason}") from error


def locate_here(model_path: str) -> Path | None:
    """The folder of a checkpoint that is on this machine, or None. Nothing is downloaded."""
    folder = Path(model_path)
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(model_path):
        return None
    import huggingface_hub

    try:
        return Path(cast(Any, huggingface_hub).snapshot_download(model_path, local_files_only=True))
    except (OSError, ValueError):
        return None


def check_layout(folder: Path, components: Sequence[str]) -> None:
    """Raise `CheckpointError` for a class that this engine does not run, or a file of these components not there.

    A configuration of every component has to be there, wherever its weights are.
    """
    index = read_json(folder / "model_index.json")
    for component, classes in CLASSES.items():
        _library, named = index.get(component) or (None, None)
        if named not in classes:
            raise CheckpointError(f"{folder / 'model_index.json'}: {component} is {named}; it has to be {classes[0]}")
    expected = [folder / "scheduler" / "scheduler_config.json", folder / "tokenizer" / "tokenizer.json"]
    expected += [folder / component / "config.json" for component in WEIGHTS]
    for component in components:
        expected += _weight_files(folder / component / WEIGHTS[component])
    for path in expected:
        if not path.is_file():
            raise CheckpointError(f"{path} is not there")
    config = folder / "text_encoder" / "config.json"
    if read_json(config).get("model_type") != "qwen3":
        # transformers fills an empty configuration with its own idea of the network, of eight billion parameters.
        raise CheckpointError(f"{config}: model_type has to be qwen3")


def check_whole(folder: Path, components: Sequence[str]) -> None:
    """As `check_layout`, and every weight file is as long as its header says: a download that was cut off is not.

    No weight is read. Raises `CheckpointError`.
    """
    check_layout(folder, components)
    for component in components:
        for path in _weight_files(folder / component / WEIGHTS[component]):
            size, expected = path.stat().st_size, _length_said(path)
            if size != expected:
                raise CheckpointError(f"{path} has {size} bytes; its header says {expected}")


@dataclass(frozen=True, slots=True)
class Depths:
    """How many main blocks a checkpoint's networks have, by their configurations: 30 and 36."""

    transformer: int
    text_encoder: int

    @classmethod
    def of_checkpoint(cls, folder: Path) -> "Depths":
        """Raises `CheckpointError`, naming the file."""
        transformer = read_json(folder / "transformer" / "config.json")
        text_encoder = read_json(folder / "text_encoder" / "config.json")
        return cls(int(transformer["n_layers"]), int(text_encoder["num_hidden_layers"]))

    def check(self, request: GenerationRequest) -> None:
        """Raise `InvalidRequest` for layers, to be skipped or read, that the checkpoint does not have."""
        check_layers(request, self.transformer)
        field = "layer_weights" if request.layer_weights else "hidden_layer"
        deepest = min(map(int, request.layer_weights), default=request.hidden_layer)
        if deepest < -self.text_encoder:
            detail = f"{deepest}; this text encoder has the layers -{self.text_encoder} to -1"
            raise InvalidRequest.field(field, detail)


def check_layers(request: GenerationRequest, count: int) -> None:
    """Raise `InvalidRequest` for a layer to be skipped that a transformer of so many does not have."""
    faults = [
        FieldError(f"{pointer}/layers", f"names layer {max(slg.layers)}; this checkpoint has 0 to {count - 1}")
        for pointer, slg in said_everywhere(request.slg, request.passes, "slg")
        if max(slg.layers) >= count
    ]
    if faults:
        raise InvalidRequest(faults)


def revision(folder: Path, components: Sequence[str], files: Mapping[str, Path] | None = None) -> str:
    """Which weights these are: a SHA-256 over path, size and first MiB of the components' files, 16 hexadecimal digits.

    `files` are single files in the place of components' weights. The first MiB holds a weight file's list of tensors
    and some of their values, so two trainings differ, and 32 GB need not be read.
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
    """Which text encoder a checkpoint's embeddings come from, as a SHA-256 in hexadecimal.

    Of the encoder's configuration and the tokenizer, which every installation has, one without the encoder's weights
    too. Trainings of one architecture with one tokenizer are a family. Raises `CheckpointError` for a missing file.
    """
    digest = hashlib.sha256()
    for path in (folder / "text_encoder" / "config.json", folder / "tokenizer" / "tokenizer.json"):
        try:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A configuration of the checkpoint. Raises `CheckpointError`, naming the file."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _weight_files(path: Path) -> list[Path]:
    """One file, or the shards that its index names."""
    index = path.with_name(f"{path.name}.index.json")
    if not index.is_file():
        return [path]
    try:
        shards = msgspec.convert(read_json(index), _ShardIndex).weight_map
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{index}: {error}") from error
    return sorted({path.with_name(shard) for shard in shards.values()})


def _length_said(path: Path) -> int:
    """Bytes of a safetensors file by its header: eight for the header's length, the header, the last tensor's end."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = msgspec.json.decode(file.read(min(length, LONGEST_HEADER_BYTES)), type=dict[str, dict[str, Any]])
            ends = [int(tensor["data_offsets"][1]) for name, tensor in header.items() if name != "__metadata__"]
        except (msgspec.DecodeError, KeyError, IndexError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is not a safetensors file") from error
    return 8 + length + max(ends, default=0)

"""The LoRAs of an image that `--from` repeats, found by the SHA-256 that the image records.

An image records the LoRAs of its request (`lora:NAME`; `lora_strict:NAME` is `false` for one that was used without what
did not fit), and those that the settings fused into the model (`lora_fused:NAME`). Their files are looked for among
those of `--lora` and `lora.paths`, in `lora.folder`, next to the image, and in the working folder. Needs no torch.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from zcore.errors import InvalidRequest
from zcore.foreign_text import excerpt
from zcore.image_files.writing import ImageParameters
from zcore.settings import Settings

SUFFIX = ".safetensors"

_REQUESTED, _STRICT, _FUSED = "lora:", "lora_strict:", "lora_fused:"
_FUSED_VALUE = re.compile(r"(?P<sha256>[0-9a-f]{64}) at (?P<scale>-?\d+(\.\d+)?(e-?\d+)?)")


@dataclass(frozen=True, slots=True)
class RecordedLoras:
    """Files of the LoRAs that the request names, by name, and files to fuse with their scales.

    `not_strict` are the names of those that are used without what does not fit the model.
    `are_replaced` says that `--lora` gave other ones than the image records, which are used instead of all of those.
    """

    of_request: Mapping[str, Path] = field(default_factory=dict[str, Path])
    fused: tuple[tuple[Path, float], ...] = ()
    not_strict: frozenset[str] = frozenset()
    are_replaced: bool = False


def find_loras(original: ImageParameters, image: Path, settings: Settings, *, are_given: bool) -> RecordedLoras:
    """Return the files of all LoRAs that made the image.

    `are_given` says that the files to fuse come from `--lora`. One of those with the recorded content, and with the
    recorded scale or 1, supplies the file of that LoRA; any other replaces all LoRAs of the image. Raises
    `InvalidRequest` naming each LoRA that was not found.
    """
    recorded = [
        *(
            _Recorded(use.name, original.made_by.get(f"{_REQUESTED}{use.name}", ""), use.scale, of_request=True)
            for use in original.request.loras
        ),
        *(_fused(name, value) for name, value in original.made_by.items() if name.startswith(_FUSED)),
    ]
    if are_given and not all(_supplies(path, scale, recorded) for path, scale in settings.fused_loras):
        return RecordedLoras(fused=tuple(settings.fused_loras), are_replaced=True)
    files = _files_of({one.sha256 for one in recorded}, _candidates(image, settings))
    missing = [
        f"{excerpt(one.name)} (SHA-256 {one.sha256 or 'unknown'})" for one in recorded if one.sha256 not in files
    ]
    if missing:
        raise InvalidRequest.field(
            "--from",
            f"the image was made with LoRAs whose files were not found: {', '.join(missing)}; add each with "
            "--lora FILE, name their folder with --set lora.folder=FOLDER, or put them next to the image",
        )
    return RecordedLoras(
        {one.name: files[one.sha256] for one in recorded if one.of_request},
        tuple((files[one.sha256], one.scale) for one in recorded if not one.of_request),
        frozenset(
            use.name for use in original.request.loras if original.made_by.get(f"{_STRICT}{use.name}") == "false"
        ),
    )


def with_fused(settings: Settings, loras: RecordedLoras) -> Settings:
    """Return the settings with these LoRAs fused, instead of their own."""
    paths, scales = tuple(str(path.absolute()) for path, _ in loras.fused), tuple(scale for _, scale in loras.fused)
    return msgspec.structs.replace(settings, lora=msgspec.structs.replace(settings.lora, paths=paths, scales=scales))


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A LoRA that an image records; the SHA-256 is in hexadecimal."""

    name: str
    sha256: str
    scale: float
    of_request: bool


def _fused(key: str, value: str) -> _Recorded:
    found = _FUSED_VALUE.fullmatch(value)
    if found is None:
        raise InvalidRequest.field("--from", f"the image records {excerpt(key)} in an unknown way: {excerpt(value)}")
    return _Recorded(key.removeprefix(_FUSED), found["sha256"], float(found["scale"]), of_request=False)


def _supplies(path: Path, scale: float, recorded: Iterable[_Recorded]) -> bool:
    fitting = {one.sha256 for one in recorded if scale in (one.scale, 1.0)}
    return bool(_files_of(fitting, [path]))


def _candidates(image: Path, settings: Settings) -> Iterable[Path]:
    yield from (path for path, _ in settings.fused_loras)
    for folder in (settings.lora_path, image.parent, Path()):
        if folder is not None:
            yield from sorted(folder.glob(f"*{SUFFIX}"))


def _files_of(digests: Set[str], paths: Iterable[Path]) -> dict[str, Path]:
    """Return the first file with each digest; files are read only until all are found, for they may be checkpoints."""
    found: dict[str, Path] = {}
    for path in paths:
        if found.keys() == digests:
            break
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest in digests:
                found.setdefault(digest, path)
    return found

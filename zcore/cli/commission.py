"""What a command line of `zimage generate` asks to be painted, decided before the model is loaded.

Takes what was said and the settings; gives a `Commission`: the request, which of its pictures, and the pictures it
starts from. A picture that is to be painted again (`--from`) brings its own request, over which other flags stand.
Needs no torch.
"""

import argparse
import hashlib
from collections.abc import Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from PIL import Image

from zcore.cli.files import read_given
from zcore.cli.request_flags import TEXT_FIELDS, fields_said_as_settings, flag_of, said_fields
from zcore.errors import InvalidRequest
from zcore.imaging.encode import PictureParameters, read_parameters
from zcore.imaging.input_picture import open_picture
from zcore.imaging.text.embedding_header import read_header
from zcore.imaging.text.templates import TemplateLibrary
from zcore.request import (
    GIVEN,
    INPUT_FIELDS,
    SEED_BOUND,
    SIZE_FIELDS,
    GenerationRequest,
    OutputFormat,
    parse_generation,
)
from zcore.settings import Settings
from zcore.sizes import SIDE_MULTIPLE_PX

SUFFIXES: dict[str, OutputFormat] = {
    ".png": "png",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".webp": "webp",
    ".avif": "avif",
}

NAMED_BY = {"embedding": "prompt"}
"""Which field of the request names a file, where it is not called as the file is."""


@dataclass(frozen=True, slots=True)
class GivenFile:
    """A file that a picture starts from."""

    content: bytes
    sha256: str
    address: str
    picture: Image.Image | None = None


@dataclass(frozen=True, slots=True)
class Commission:
    """Pictures `indexes` of `request`. `given` has its files: `image`, `mask` and `embedding`, as far as it has them.

    `repeats` holds how the picture was made whose pixels are to be painted again, if one is.
    """

    request: GenerationRequest
    indexes: tuple[int, ...]
    given: dict[str, GivenFile] = field(default_factory=dict[str, GivenFile])
    repeats: PictureParameters | None = None

    def picture(self, name: str) -> Image.Image | None:
        """The picture called `image` or `mask`."""
        return self.given[name].picture if name in self.given else None

    def alone(self, index: int) -> GenerationRequest:
        """Picture `index` as a request of its own."""
        return msgspec.structs.replace(self.request, seed=self.request.seed_of(index), n=1)


def commissioned(said: argparse.Namespace, settings: Settings) -> Commission:
    """What is to be painted. Raises `InvalidRequest`."""
    fields, by_settings = said_fields(said), fields_said_as_settings(said)
    original = _original(said.original) if said.original else None
    given = _given(said, fields, original)
    decided = {
        **_kept(original, fields.keys() | by_settings, "embedding" in given),
        **_format(said.output, fields),
        **fields,
    }
    decided |= {NAMED_BY.get(name, name): file.address for name, file in given.items()}
    if original is None and not fields.keys() & {"width", "height", *SIZE_FIELDS}:
        decided |= _own_size(given)
    request = parse_generation(decided, settings.generation_defaults, settings.limits)
    check_template(request, settings)
    if original is None or fields.keys() & {"seed", "n"}:
        return Commission(request, tuple(range(request.n)), given)
    # The request that it was one picture of, so that it is numbered as it was.
    first_seed = (request.seed - original.index) % SEED_BOUND
    whole = msgspec.structs.replace(request, seed=first_seed)
    is_repeated = fields.keys() | by_settings <= {"format", "quality"}
    return Commission(whole, (original.index,), given, original if is_repeated else None)


def suffix_of(format: OutputFormat) -> str:  # noqa: A002
    """What a file of this format ends in, where nobody says."""
    return next(suffix for suffix, one in SUFFIXES.items() if one == format)


def check_template(request: GenerationRequest, settings: Settings) -> None:
    """Raise `InvalidRequest` for a template that does not exist; the pipeline would find it only once it is loaded."""
    if request.template is not None:
        TemplateLibrary.load(*settings.templates_paths).get(request.template)


def _original(path: Path) -> PictureParameters:
    parameters = read_parameters(read_given(path, "--from"))
    if parameters is None:
        raise InvalidRequest.field("--from", f"{path} does not say how it was made")
    return parameters


def _kept(original: PictureParameters | None, decided: Set[str], is_encoded: bool) -> dict[str, Any]:
    """What the picture to be repeated says, but for what flags have decided, a size by name too.

    Nor its words, where it was painted from them and an embedding takes their place.
    """
    if original is None:
        return {}
    replaced = {"version", *decided, *(("width", "height") if decided & set(SIZE_FIELDS) else ())}
    if is_encoded and "embedding" not in original.inputs:
        replaced.update(TEXT_FIELDS)
    return {name: value for name, value in msgspec.to_builtins(original.request).items() if name not in replaced}


def _format(output: Path | None, fields: dict[str, Any]) -> dict[str, OutputFormat]:
    """What the file's suffix says, where no flag does."""
    if output is None or "format" in fields:
        return {}
    if output.suffix.lower() not in SUFFIXES:
        raise InvalidRequest.field("--output", f"{output} has to end in one of {', '.join(SUFFIXES)}, or say --format")
    return {"format": SUFFIXES[output.suffix.lower()]}


def _given(
    said: argparse.Namespace, fields: dict[str, Any], original: PictureParameters | None
) -> dict[str, GivenFile]:
    """The files that the picture starts from: those that flags name, else those of the picture to be repeated."""
    given: dict[str, GivenFile] = {}
    for name in INPUT_FIELDS:
        if name in fields:
            given[name] = _opened(name, Path(fields[name]))
        elif original and getattr(original.request, name) is not None:
            given[name] = _found_again(name, original, said.original.parent)
    if said.embeddings:
        given["embedding"] = _read_embedding(said.embeddings, fields)
    elif original and "embedding" in original.inputs and "prompt" not in fields:
        raise InvalidRequest.field("--from", "was painted from an embedding; pass that with --embeddings")
    return given


def _opened(name: str, path: Path) -> GivenFile:
    content = read_given(path, flag_of(name))
    sha256 = hashlib.sha256(content).hexdigest()
    return GivenFile(content, sha256, f"{GIVEN}{path.name}", open_picture(content, name))


def _found_again(name: str, original: PictureParameters, folder: Path) -> GivenFile:
    """The input of a picture, by its name and its content, beside the picture or in the working folder."""
    address = str(getattr(original.request, name))
    wanted = original.inputs.get(name)
    if address.startswith(GIVEN) and wanted:
        for place in (folder, Path()):
            path = place / Path(address.removeprefix(GIVEN)).name
            if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == wanted:
                return _opened(name, path)
    raise InvalidRequest.field(
        "--from", f"the picture began from {address}, which is not at hand unchanged; pass it with {flag_of(name)}"
    )


def _read_embedding(path: Path, fields: dict[str, Any]) -> GivenFile:
    decided = [name for name in TEXT_FIELDS if name in fields]
    if decided:
        detail = "cannot be said with --embeddings: it was decided when the prompt was encoded"
        raise InvalidRequest.field(decided[0], detail)
    content = read_given(path, "--embeddings")
    prompt_sha256 = read_header(content).origin.prompt_sha256
    return GivenFile(content, hashlib.sha256(content).hexdigest(), f"embedding {prompt_sha256[:16]}")


def _own_size(given: dict[str, GivenFile]) -> dict[str, int]:
    """That of the picture to start from, rounded down to what can be painted."""
    picture = given["image"].picture if "image" in given else None
    if picture is None:
        return {}
    return {side: getattr(picture, side) // SIDE_MULTIPLE_PX * SIDE_MULTIPLE_PX for side in ("width", "height")}

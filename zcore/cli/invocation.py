"""What a `zimage generate` command line requests, determined before the model is loaded.

`read_invocation` builds from the parsed arguments and the settings an `Invocation`: the request, the indexes of the
images to generate, and the input files. `--from` takes the request from an existing image; other flags override it.
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

from zcore.checkpoint.defaults import generation_defaults
from zcore.cli.files import read_file
from zcore.cli.recorded_loras import RecordedLoras, find_loras
from zcore.cli.request_flags import TEXT_FIELDS, fields_set_by_settings, flag_of, given_fields
from zcore.errors import InvalidRequest
from zcore.image_files.input_images import open_image
from zcore.image_files.writing import ImageParameters, read_parameters
from zcore.prompt.embedding_header import read_header
from zcore.prompt.templates import TemplateLibrary
from zcore.request import (
    INPUT_FIELDS,
    LOCAL_PREFIX,
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

ADDRESS_FIELDS = {"embedding": "prompt"}
"""Request field that holds the address of an input, if its name differs from the input's."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """An input of the generation. `image` is its decoded content, or None for an embedding."""

    content: bytes
    sha256: str
    address: str
    image: Image.Image | None = None


@dataclass(frozen=True, slots=True)
class Invocation:
    """The images of `request` to generate: those with an index in `indexes`.

    `files` maps `image`, `mask` and `embedding` to the inputs that were given. `repeats` holds the parameters of the
    image that is repeated pixel by pixel, if there is one. `loras` are the files of the original's LoRAs; None without
    an original, whose settings then decide.
    """

    request: GenerationRequest
    indexes: tuple[int, ...]
    files: dict[str, InputFile] = field(default_factory=dict[str, InputFile])
    repeats: ImageParameters | None = None
    loras: RecordedLoras | None = None

    def image(self, name: str) -> Image.Image | None:
        """Return the input `image` or `mask`, or None if it was not given."""
        return self.files[name].image if name in self.files else None

    def single(self, index: int) -> GenerationRequest:
        """Return the request that generates image `index` alone."""
        return msgspec.structs.replace(self.request, seed=self.request.seed_of(index), n=1)


def read_invocation(arguments: argparse.Namespace, settings: Settings) -> Invocation:
    """Return what the arguments request. Raises `InvalidRequest`."""
    fields, set_by_settings = given_fields(arguments), fields_set_by_settings(arguments)
    original = _read_original(arguments.original) if arguments.original else None
    files = _input_files(arguments, fields, original, settings.limits.max_input_pixels)
    loras = None
    if original is not None:
        loras = find_loras(original, arguments.original, settings, are_given=bool(arguments.lora))
    body = {
        **_inherited(original, fields.keys() | set_by_settings, "embedding" in files),
        **_format_by_suffix(arguments.output, fields),
        **fields,
    }
    body |= {ADDRESS_FIELDS.get(name, name): file.address for name, file in files.items()}
    if original is None and not fields.keys() & {"width", "height", *SIZE_FIELDS}:
        body |= _size_of_input(files)
    if loras is not None and loras.are_replaced:
        body["loras"] = []
    request = parse_generation(body, generation_defaults(settings), settings.limits)
    check_template(request, settings)
    if original is None or fields.keys() & {"seed", "n"}:
        return Invocation(request, tuple(range(request.n)), files, loras=loras)
    # Restore the request that produced the original as one of its images, so that it gets the same index again.
    first_seed = (request.seed - original.index) % SEED_BOUND
    full_request = msgspec.structs.replace(request, seed=first_seed)
    is_exact_repeat = fields.keys() | set_by_settings <= {"format", "quality"} and not (loras and loras.are_replaced)
    return Invocation(full_request, (original.index,), files, original if is_exact_repeat else None, loras)


def suffix_of(format: OutputFormat) -> str:  # noqa: A002
    """Return the default file suffix of a format."""
    return next(suffix for suffix, one in SUFFIXES.items() if one == format)


def check_template(request: GenerationRequest, settings: Settings) -> None:
    """Raise `InvalidRequest` for an unknown template, which the pipeline would report only after loading the model."""
    if request.template is not None:
        TemplateLibrary.load(*settings.templates_paths).get(request.template)


def _read_original(path: Path) -> ImageParameters:
    parameters = read_parameters(read_file(path, "--from"))
    if parameters is None:
        raise InvalidRequest.field("--from", f"{path} contains no zimage parameters, so it cannot be repeated")
    return parameters


def _inherited(original: ImageParameters | None, overridden: Set[str], uses_embedding: bool) -> dict[str, Any]:
    """Return the fields that the request takes from the original image: all that no flag overrides.

    A size given in any form overrides width and height. An embedding overrides the text fields, unless the original was
    itself made from an embedding.
    """
    if original is None:
        return {}
    replaced = {"version", *overridden, *(("width", "height") if overridden & set(SIZE_FIELDS) else ())}
    if uses_embedding and "embedding" not in original.inputs:
        replaced.update(TEXT_FIELDS)
    return {name: value for name, value in msgspec.to_builtins(original.request).items() if name not in replaced}


def _format_by_suffix(output: Path | None, fields: dict[str, Any]) -> dict[str, OutputFormat]:
    """Return the format that the suffix of `--output` selects, unless `--format` is given."""
    if output is None or str(output) == "-" or "format" in fields:  # `check_output_path` refuses `-`
        return {}
    if output.suffix.lower() not in SUFFIXES:
        raise InvalidRequest.field("--output", f"{output} must end in one of {', '.join(SUFFIXES)}; or add --format")
    return {"format": SUFFIXES[output.suffix.lower()]}


def _input_files(
    arguments: argparse.Namespace, fields: dict[str, Any], original: ImageParameters | None, max_pixels: int
) -> dict[str, InputFile]:
    """Return the inputs that flags name, and those of the original image for which there is no flag."""
    files: dict[str, InputFile] = {}
    for name in INPUT_FIELDS:
        if name in fields:
            files[name] = _open_image(name, Path(fields[name]), max_pixels)
        elif original and getattr(original.request, name) is not None:
            files[name] = _find_original_input(name, original, arguments.original.parent, max_pixels)
    if arguments.embeddings:
        files["embedding"] = _read_embedding(arguments.embeddings, fields)
    elif original and "embedding" in original.inputs and "prompt" not in fields:
        raise InvalidRequest.field("--from", "the image was made from an embedding; add it with --embeddings")
    return files


def _open_image(name: str, path: Path, max_pixels: int) -> InputFile:
    content = read_file(path, flag_of(name))
    sha256 = hashlib.sha256(content).hexdigest()
    return InputFile(content, sha256, f"{LOCAL_PREFIX}{path.name}", open_image(content, name, max_pixels))


def _find_original_input(name: str, original: ImageParameters, folder: Path, max_pixels: int) -> InputFile:
    """Find an input of the original image by its name and content, next to the image or in the working folder."""
    address = str(getattr(original.request, name))
    sha256 = original.inputs.get(name)
    if address.startswith(LOCAL_PREFIX) and sha256:
        for candidate in (folder, Path()):
            path = candidate / Path(address.removeprefix(LOCAL_PREFIX)).name
            if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
                return _open_image(name, path, max_pixels)
    raise InvalidRequest.field(
        "--from", f"the image started from {address}; no unchanged copy of it was found; add it with {flag_of(name)}"
    )


def _read_embedding(path: Path, fields: dict[str, Any]) -> InputFile:
    conflicting = [name for name in TEXT_FIELDS if name in fields]
    if conflicting:
        detail = "cannot be combined with --embeddings: it was fixed when the prompt was encoded"
        raise InvalidRequest.field(conflicting[0], detail)
    content = read_file(path, "--embeddings")
    prompt_sha256 = read_header(content).origin.prompt_sha256
    return InputFile(content, hashlib.sha256(content).hexdigest(), f"embedding {prompt_sha256[:16]}")


def _size_of_input(files: dict[str, InputFile]) -> dict[str, int]:
    """Return the size of the input image, rounded down to the nearest valid size."""
    image = files["image"].image if "image" in files else None
    if image is None:
        return {}
    return {side: getattr(image, side) // SIDE_MULTIPLE_PX * SIDE_MULTIPLE_PX for side in ("width", "height")}

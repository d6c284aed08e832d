"""Image files that record how they were generated: writing them, and reading the parameters back.

Takes an image, its request, and a description of what generated it; returns the bytes of a PNG, JPEG, WebP, or AVIF
file, the same for the same input. Needs no torch.

The parameters are JSON. `request` is a complete request with this image's own seed and n = 1, so that sending it again
generates this image alone; `index` is the image's position among those of its original request; `made_by` is
`ZImagePipeline.describe()`; `inputs` has the SHA-256 of each input image. PNG holds them in one iTXt chunk `zimage`,
the other formats in an XMP packet. No format limits their size: any valid request fits.

Other programs read the `Marks` of a file: the digital source type of IPTC, the parameters as text, a C2PA manifest.
"""

import hashlib
import io
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import msgspec
from PIL import Image, PngImagePlugin

from zcore.image_files import exif, xmp
from zcore.image_files.content_credentials import CredentialSigner
from zcore.image_files.digital_source import digital_source_type
from zcore.image_files.parameters_text import parameters_text
from zcore.request import GenerationRequest, OutputFormat

CHUNK = "zimage"
XMP_CHUNK = "XML:com.adobe.xmp"
TEXT_CHUNK = "parameters"
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF")
AVIF_THREADS = 4
"""Fixed for all machines: with one thread libaom writes different bytes than with two or more."""

UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,  # includes msgspec's
    struct.error,
    RuntimeError,  # raised by the AVIF decoder, and for nesting that is too deep
    Image.DecompressionBombError,
    Warning,  # if warnings are errors
)
"""The errors that Pillow and msgspec raise for invalid bytes."""


class ImageParameters(msgspec.Struct, frozen=True):
    """How an image was generated. `inputs` has the SHA-256, in hexadecimal, of the files `image` and `mask`, if any."""

    request: GenerationRequest
    index: int
    made_by: dict[str, str]
    inputs: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class Marks:
    """What a file contains for other programs, besides its parameters.

    `digital_source_type` marks it in XMP as generated (IPTC), `parameters_text` adds the text that programs in the
    manner of AUTOMATIC1111's web UI show, and a `signer` adds a signed C2PA manifest.
    """

    digital_source_type: bool = True
    parameters_text: bool = True
    signer: CredentialSigner | None = None


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image as bytes. `sha256` covers the whole content, in hexadecimal."""

    content: bytes
    format: OutputFormat
    width: int
    height: int
    sha256: str

    @property
    def media_type(self) -> str:
        """The value for a Content-Type header."""
        return f"image/{self.format}"


def write_image(
    image: Image.Image,
    request: GenerationRequest,
    index: int,
    made_by: Mapping[str, str],
    inputs: Mapping[str, str] = {},
    marks: Marks = Marks(),
) -> ImageFile:
    """Encode image `index` of `request` in the request's format and quality, with its parameters and marks inside.

    Raises `SigningError`.
    """
    own_request = msgspec.structs.replace(request, seed=request.seed_of(index), n=1)
    parameters = ImageParameters(own_request, index, dict(made_by), dict(inputs))
    buffer = io.BytesIO()
    image.save(buffer, request.format, **_options(parameters, marks))
    content = buffer.getvalue()
    if marks.signer is not None:  # last, because it signs every byte before it
        content = marks.signer.sign(content, own_request, made_by, inputs)
    return ImageFile(content, request.format, image.width, image.height, hashlib.sha256(content).hexdigest())


def read_parameters(content: bytes) -> ImageParameters | None:
    """Return how this image was generated, or None if it is not from this service or its parameters were removed.

    Takes any bytes and decodes no pixels.
    """
    try:
        text = _found_text(content)
        return msgspec.json.decode(text, type=ImageParameters) if text is not None else None
    except UNREADABLE:
        return None


def _as_text(parameters: ImageParameters) -> str:
    """Encode as JSON, with escapes for U+FFFE and U+FFFF, which XML does not allow."""
    text = msgspec.json.encode(parameters, order="sorted").decode()
    return text.replace("\ufffe", r"\ufffe").replace("\uffff", r"\uffff")


def _options(parameters: ImageParameters, marks: Marks) -> dict[str, Any]:
    """Return Pillow's options for the format."""
    request = parameters.request
    text = _as_text(parameters)
    source = digital_source_type(request) if marks.digital_source_type else None
    shown = parameters_text(request, parameters.made_by) if marks.parameters_text else None
    if request.format == "png":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt(CHUNK, text)
        if source is not None:
            chunks.add_itxt(XMP_CHUNK, xmp.packet(None, source).decode())
        if shown is not None:
            chunks.add_text(TEXT_CHUNK, shown)
        return {"pnginfo": chunks}
    options: dict[str, Any] = {"quality": request.quality}
    comment = exif.user_comment(shown) if shown is not None else None
    if request.format == "jpeg":
        parts = xmp.jpeg_packet(text, source)
        options |= {"xmp": parts.main, "extra": parts.extensions}
        if comment is not None and len(comment) > exif.LARGEST_IN_JPEG_BYTES:
            comment = None
    else:
        options["xmp"] = xmp.packet(text, source)
    if request.format == "avif":
        options["max_threads"] = AVIF_THREADS
    return options if comment is None else {**options, "exif": comment}


def _found_text(content: bytes) -> str | None:
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        if image.format == "PNG":
            found = image.info.get(CHUNK)
            return str(found) if found is not None else None
        packet = cast(bytes | None, image.info.get("xmp"))
        if packet is None:
            return None
        segments = cast(list[tuple[str, bytes]], getattr(image, "applist", []))  # only a JPEG has them
        return xmp.text_in(packet, (segment for name, segment in segments if name == "APP1"))

"""A picture as a file that says how it was made, and back.

Takes an image, its request and what painted it; gives the bytes of a PNG, JPEG, WebP or AVIF file, the same for the
same input. Reads the parameters back from such bytes. Needs no torch. Does not know where the bytes go.

The parameters are JSON. `request` is a request by itself, with this picture's own seed and n = 1, so that sending it
again paints this picture alone; `index` is the picture's place among those of the request it came from; `made_by` is
`ZImagePipeline.describe()`; `inputs` has the SHA-256 of each picture that it began from. PNG holds them in one iTXt
chunk `zimage`, the other formats in an XMP packet. No format bounds them: what a request may say always fits.
"""

import hashlib
import io
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import msgspec
from PIL import Image, PngImagePlugin

from zcore.imaging import xmp
from zcore.request import GenerationRequest, OutputFormat

CHUNK = "zimage"
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF")
AVIF_THREADS = 4
"""Whatever the machine has: with one thread libaom writes other bytes than with two or more."""

UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,  # msgspec's too
    struct.error,
    RuntimeError,  # the AVIF decoder's, and of nesting without end
    Image.DecompressionBombError,
    Warning,  # where warnings are errors
)
"""What Pillow and msgspec raise at bytes that are not as they have to be."""


class PictureParameters(msgspec.Struct, frozen=True):
    """How a picture was made. `inputs` has the SHA-256, in hexadecimal, of the files `image` and `mask`, if any."""

    request: GenerationRequest
    index: int
    made_by: dict[str, str]
    inputs: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """A picture as bytes. `sha256` is of the whole content, in hexadecimal."""

    content: bytes
    format: OutputFormat
    width: int
    height: int
    sha256: str

    @property
    def media_type(self) -> str:
        """As in a Content-Type header."""
        return f"image/{self.format}"


def encode_image(
    image: Image.Image,
    request: GenerationRequest,
    index: int,
    made_by: Mapping[str, str],
    inputs: Mapping[str, str] = {},
) -> EncodedImage:
    """Picture `index` of `request` in the request's format and quality, with its parameters inside."""
    own_request = msgspec.structs.replace(request, seed=request.seed_of(index), n=1)
    text = _as_text(PictureParameters(own_request, index, dict(made_by), dict(inputs)))
    buffer = io.BytesIO()
    image.save(buffer, request.format, **_options(request, text))
    content = buffer.getvalue()
    return EncodedImage(content, request.format, image.width, image.height, hashlib.sha256(content).hexdigest())


def read_parameters(content: bytes) -> PictureParameters | None:
    """How this picture was made; None when it is not one of this service, or its parameters were stripped.

    Takes any bytes, and decodes no pixels.
    """
    try:
        text = _found_text(content)
        return msgspec.json.decode(text, type=PictureParameters) if text is not None else None
    except UNREADABLE:
        return None


def _as_text(parameters: PictureParameters) -> str:
    """JSON. U+FFFE and U+FFFF, which no XML may hold, are written as JSON escapes."""
    text = msgspec.json.encode(parameters, order="sorted").decode()
    return text.replace("\ufffe", r"\ufffe").replace("\uffff", r"\uffff")


def _options(request: GenerationRequest, text: str) -> dict[str, Any]:
    """What Pillow is told for the format."""
    if request.format == "png":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt(CHUNK, text)
        return {"pnginfo": chunks}
    packet = xmp.packet(text)
    if request.format == "jpeg":
        parts = xmp.split_for_jpeg(packet)
        return {"quality": request.quality, "xmp": parts.main, "extra": parts.extensions}
    if request.format == "avif":
        return {"quality": request.quality, "xmp": packet, "max_threads": AVIF_THREADS}
    return {"quality": request.quality, "xmp": packet}


def _found_text(content: bytes) -> str | None:
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        if image.format == "PNG":
            found = image.info.get(CHUNK)
            return str(found) if found is not None else None
        packet = cast(bytes | None, image.info.get("xmp"))
        if packet is None:
            return None
        segments = cast(list[tuple[str, bytes]], getattr(image, "applist", []))  # a JPEG's
        return xmp.text_in(packet, (segment for name, segment in segments if name == "APP1"))

"""A picture as a file that says how it was made, and back.

Takes an image, its request and what painted it; gives PNG bytes, the same for the same input. Reads the parameters
back from such bytes. Needs no torch. Does not know where the bytes go.

The parameters are JSON in one iTXt chunk `zimage`: `request` is a request by itself, with this picture's own seed and
n = 1, so that sending it again paints this picture alone; `index` is the picture's place among those of the request
it came from; `made_by` is `ZImagePipeline.describe()`.
"""

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import msgspec
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from zcore.request import GenerationRequest

CHUNK = "zimage"


class PictureParameters(msgspec.Struct, frozen=True):
    """How a picture was made."""

    request: GenerationRequest
    index: int
    made_by: dict[str, str]


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """A picture as bytes. `sha256` is of the whole content, in hexadecimal."""

    content: bytes
    format: Literal["png"]
    width: int
    height: int
    sha256: str


def encode_png(image: Image.Image, request: GenerationRequest, index: int, made_by: Mapping[str, str]) -> EncodedImage:
    """Picture `index` of `request` as PNG, with its parameters inside."""
    own_request = msgspec.structs.replace(request, seed=request.seed_of(index), n=1)
    parameters = PictureParameters(own_request, index, dict(made_by))
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt(CHUNK, msgspec.json.encode(parameters, order="sorted").decode())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=chunks)
    content = buffer.getvalue()
    return EncodedImage(content, "png", image.width, image.height, hashlib.sha256(content).hexdigest())


def read_parameters(content: bytes) -> PictureParameters | None:
    """How this PNG was made; None when it is not a picture of this service, or its parameters were stripped."""
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            image.load()  # chunks behind the pixels too
            found = image.info.get(CHUNK)
        return msgspec.json.decode(str(found), type=PictureParameters) if found is not None else None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):  # msgspec's errors are ValueErrors
        return None

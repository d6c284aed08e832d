"""Any picture that a user has, as exactly the pixels that a request needs.

Takes the bytes of a file, or an image of any kind and size; gives an upright image of the request's width and height:
RGB to start from, or one grey channel for a mask. What is no picture, or too large to open, is an `InvalidRequest` that
names the field. Needs no torch. Does not know where the bytes come from.

Colours are taken as they are stored: a colour profile in the file is not applied.
"""

import io
import struct

from PIL import Image, ImageDraw, ImageOps, ImageStat

from zcore.errors import InvalidRequest
from zcore.request import Fit
from zcore.sizes import LARGEST_SIDE_PX

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")

PIXELS_AT_MOST = LARGEST_SIDE_PX**2
"""Of a file; as many as the largest picture that can be asked for. Looked at before anything is decoded."""

MODES = frozenset(["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"])
"""Pillow's kinds of pixels with eight bits a channel, beside which 16-bit grey is taken."""

_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    ArithmeticError,
    TypeError,
    LookupError,
    EOFError,
    RuntimeError,  # the AVIF decoder's
    struct.error,
    Warning,  # where warnings are errors
)
"""What Pillow's decoders raise at bytes that are not as they have to be."""


def open_picture(content: bytes, field: str) -> Image.Image:
    """The picture in a user's file: the first one if it moves, turned as its camera says.

    Raises `InvalidRequest` on `field` for what is not a whole PNG, JPEG, WebP, AVIF, GIF, BMP or TIFF, has more than
    `PIXELS_AT_MOST`, or has 32-bit pixels, whose white nobody knows.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            pixels = image.width * image.height
            if pixels > PIXELS_AT_MOST:
                raise _too_large(field, f"is {image.width}x{image.height}, {pixels} pixels")
            _check_pixels(image, field)
            image.load()
            return _upright(image)
    except InvalidRequest:
        raise
    except _TOO_LARGE as error:
        raise _too_large(field, "is too large to open") from error
    except Image.UnidentifiedImageError as error:
        raise InvalidRequest.field(
            field, "is not a picture, or not a whole one; PNG, JPEG, WebP, AVIF, GIF, BMP and TIFF are taken"
        ) from error
    except _DAMAGED as error:
        raise InvalidRequest.field(field, "is a damaged picture, or breaks off before its end") from error


def format_of(content: bytes) -> str:
    """The kind of a file that `open_picture` takes, as in its media type: `png`, `jpeg`, `webp` and so on."""
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        kind = str(image.format).lower()
    return "jpeg" if kind == "mpo" else kind  # as cameras write them: a JPEG with further pictures behind it


def fitted(image: Image.Image, width: int, height: int, fit: Fit) -> Image.Image:
    """The image as RGB of just this size, resampled with Lanczos.

    What is transparent is laid over white. `cover` fills the size and cuts the middle out; `contain` shows all of it,
    between two bars in the mean colour of its own edge; `stretch` ignores proportions. An RGB image of this size keeps
    every pixel. Of a file that moves, the frame it is at. Raises `InvalidRequest` on `image` for 32-bit pixels.
    """
    picture = _eight_bits(_upright(image), "image")
    picture = _laid_over(picture, "white") if picture.has_transparency_data else picture.convert("RGB")
    return _placed(picture, width, height, fit, Image.Resampling.LANCZOS, bars=None)


def mask_fitted(mask: Image.Image, width: int, height: int, fit: Fit) -> Image.Image:
    """The mask as one channel (L) of just this size: 255 is painted anew, 0 kept, what lies between in that part.

    It is the brightness of the picture, laid over black where that is transparent. One that is black all over then has
    nothing but its transparency to say something, and what is opaque in it is painted anew. The bars of `contain` are
    white: behind them is no picture to keep. It lies right over an image of its own proportions.
    Raises `InvalidRequest` on `mask` for 32-bit pixels.
    """
    grey = _brightness(_eight_bits(_upright(mask), "mask"))
    return _placed(grey, width, height, fit, Image.Resampling.BILINEAR, bars=255)


def _too_large(field: str, complaint: str) -> InvalidRequest:
    return InvalidRequest.field(field, f"{complaint}; at most {PIXELS_AT_MOST} pixels are opened here")


def _check_pixels(image: Image.Image, field: str) -> None:
    if image.mode not in MODES and not image.mode.startswith("I;16"):
        raise InvalidRequest.field(field, f"has pixels of the kind {image.mode}; 8 or 16 bits a channel are taken")


def _upright(image: Image.Image) -> Image.Image:
    """A copy, turned as EXIF says where that can be read; of what else the file says, transparency alone is kept."""
    try:
        turned = ImageOps.exif_transpose(image)
    except _DAMAGED:
        turned = image.copy()
    turned.info = {name: value for name, value in turned.info.items() if name == "transparency"}
    return turned


def _eight_bits(image: Image.Image, field: str) -> Image.Image:
    _check_pixels(image, field)
    if image.mode in MODES:
        return image
    grey = image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")  # 65535 is 255
    grey.info.pop("transparency", None)  # one of 65536 values, which may share its eight bits with others
    return grey


def _laid_over(picture: Image.Image, colour: str) -> Image.Image:
    ground = Image.new("RGBA", picture.size, colour)
    return Image.alpha_composite(ground, picture.convert("RGBA")).convert("RGB")


def _brightness(mask: Image.Image) -> Image.Image:
    if not mask.has_transparency_data:
        return mask.convert("RGB").convert("L")
    grey = _laid_over(mask, "black").convert("L")
    alpha = mask.convert("RGBA").getchannel("A")
    is_opaque = alpha.getextrema() == (255, 255)
    return grey if is_opaque or grey.getbbox() is not None else alpha


def _edge_colour(picture: Image.Image) -> tuple[int, ...]:
    """The mean of the outermost pixels."""
    edge = Image.new("L", picture.size)
    ImageDraw.Draw(edge).rectangle((0, 0, picture.width - 1, picture.height - 1), outline=255)
    return tuple(round(mean) for mean in ImageStat.Stat(picture, mask=edge).mean)


def _placed(
    picture: Image.Image,
    width: int,
    height: int,
    fit: Fit,
    resampling: Image.Resampling,
    bars: int | None,
) -> Image.Image:
    """`bars` is the grey beside what does not fill the size; None for the mean colour of its edge."""
    if fit == "stretch":
        return picture.resize((width, height), resampling)
    across, down = width / picture.width, height / picture.height
    if fit == "cover":
        # The part is cut out while it is scaled: a long strip would be enormous at full length.
        scale = max(across, down)
        left = max(0.0, (picture.width - width / scale) / 2)
        top = max(0.0, (picture.height - height / scale) / 2)
        box = (left, top, picture.width - left, picture.height - top)
        return picture.resize((width, height), resampling, box=box)
    scale = min(across, down)
    inner = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), resampling)
    whole = Image.new(picture.mode, (width, height), _edge_colour(inner) if bars is None else bars)
    whole.paste(inner, ((width - inner.width) // 2, (height - inner.height) // 2))
    return whole

"""Input images: any image file a user has, converted to exactly the pixels that a request needs.

Takes the bytes of a file, or an image of any kind and size; returns an upright image of the request's width and height:
RGB to start from, or one grey channel for a mask. Raises `InvalidRequest` naming the field for bytes that are not an
image or are too large to open. Needs no torch.

An embedded ICC profile is applied to images, which become sRGB, and not to masks, whose values are not colours.
"""

import io
import struct
from functools import cache
from typing import Any, cast

import pillow_heif
from PIL import Image, ImageCms, ImageDraw, ImageOps, ImageStat
from PIL.TiffImagePlugin import SUBIFD

from zcore.errors import InvalidRequest
from zcore.image_files.file_kinds import kind_of
from zcore.image_files.jpeg_scans import has_every_scan
from zcore.request import Fit

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "HEIF", "GIF", "BMP", "TIFF")
"""Pillow's names of the accepted formats. AVIF is tried before HEIF, whose decoder fails for some AVIF files."""

ACCEPTED = "PNG, JPEG, WebP, AVIF, HEIC, GIF, BMP, and TIFF are accepted"

MODES = frozenset(["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"])
"""Pillow's modes with eight bits per channel. Besides these, 16-bit grey is accepted."""

DNG_VERSION = 50706
NEW_SUBFILE_TYPE = 254
"""TIFF tags, of Adobe's DNG 1.7 and of TIFF 6.0."""

JPEG_END = b"\xff\xd9"
JPEG_FILLINGS = (b"\x00" * 64, b"\x55" * 64)
"""Two continuations of JPEG data that decode to different pixels, if a decoder needs them at all."""

_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    ArithmeticError,
    TypeError,
    LookupError,
    EOFError,
    RuntimeError,  # raised by the AVIF decoder
    struct.error,
    Warning,  # if warnings are errors
)
"""The errors that Pillow's decoders raise for damaged files."""


def open_image(content: bytes, field: str, max_pixels: int) -> Image.Image:
    """Return the image in a user's file, rotated as its EXIF orientation specifies; of an animation the first frame.

    Its `info` has the transparent colour and the ICC profile, if the file does. Raises `InvalidRequest` on `field` for
    a file that is not a complete image of one of `FORMATS`, has more than `max_pixels` (checked before decoding), or
    has 32-bit pixels, whose white level is undefined.
    """
    if kind := kind_of(content):
        raise InvalidRequest.field(field, f"is {kind}; {ACCEPTED}")
    try:
        with _opened(content) as image:
            pixels = image.width * image.height
            if pixels > max_pixels:
                detail = f"is {image.width}x{image.height} ({pixels} pixels)"
                raise InvalidRequest.field(field, f"{detail}; at most {max_pixels} pixels are accepted")
            _check_pixels(image, field)
            if _is_camera_raw(image):
                raise InvalidRequest.field(field, f"is a camera raw file; {ACCEPTED}")
            return _upright(_loaded(image, content), in_place=True)
    except InvalidRequest:
        raise
    except _TOO_LARGE as error:
        detail = f"is too large to open; at most {max_pixels} pixels are accepted"
        raise InvalidRequest.field(field, detail) from error
    except Image.UnidentifiedImageError as error:
        raise InvalidRequest.field(field, f"is not a complete image file; {ACCEPTED}") from error
    except _DAMAGED as error:
        raise InvalidRequest.field(field, "is a damaged or incomplete image file") from error


def image_format(content: bytes) -> str:
    """Return the format of a file that `open_image` accepts, as in its media type: `png`, `jpeg`, `webp`, and so on."""
    with _opened(content) as image:
        kind = str(image.format).lower()
    return "jpeg" if kind == "mpo" else kind  # written by cameras: a JPEG with more images after it


def fit_image(image: Image.Image, width: int, height: int, fit: Fit) -> Image.Image:
    """Return the image as RGB of exactly this size, resampled with Lanczos.

    Colours are converted to sRGB if the image has an ICC profile. Transparent images are composited over white. `cover`
    fills the size and crops to the middle; `contain` shows the whole image between two bars in the mean colour of its
    edge; `stretch` ignores proportions. An sRGB image of this size keeps every pixel. An animation contributes its
    current frame. Raises `InvalidRequest` on `image` for 32-bit pixels.
    """
    upright = _in_srgb(_eight_bits(_upright(image), "image"))
    opaque = _composited(upright, "white") if upright.has_transparency_data else upright.convert("RGB")
    return _fitted(opaque, width, height, fit, Image.Resampling.LANCZOS, bars=None)


def fit_mask(mask: Image.Image, width: int, height: int, fit: Fit) -> Image.Image:
    """Return the mask as one channel (L) of exactly this size: 255 is regenerated, 0 preserved, values between partly.

    The mask is the image's brightness, composited over black if it is transparent. If the result is entirely black, the
    transparency is the mask: opaque pixels are regenerated. The bars of `contain` are white, because there is no image
    under them to preserve. The mask aligns with an image of the same proportions. Raises `InvalidRequest` on `mask` for
    32-bit pixels.
    """
    grey = _brightness(_eight_bits(_upright(mask), "mask"))
    return _fitted(grey, width, height, fit, Image.Resampling.BILINEAR, bars=255)


@cache
def _register_heif() -> None:
    """Make Pillow open HEIC and HEIF files, without the thumbnails and depth maps in them."""
    cast(Any, pillow_heif).register_heif_opener(thumbnails=False, depth_images=False, aux_images=False)


def _opened(content: bytes) -> Image.Image:
    _register_heif()
    return Image.open(io.BytesIO(content), formats=FORMATS)


def _loaded(image: Image.Image, content: bytes) -> Image.Image:
    """Return the image with its pixels. A JPEG that lacks only its end marker is complete, as it is to browsers."""
    try:
        image.load()
    except OSError:
        if image.format != "JPEG":
            raise
        return _without_end_marker(content)
    return image


def _without_end_marker(content: bytes) -> Image.Image:
    """Decode a JPEG that ends without its end marker. Raises `OSError` if image data is missing too.

    A decoder fills missing data of a scan with what follows. The scan is complete if what follows has no effect.
    """
    if not has_every_scan(content):
        raise OSError("scans are missing")
    first, second = (_opened(content.rstrip(b"\xff") + filling + JPEG_END) for filling in JPEG_FILLINGS)
    if first.tobytes() != second.tobytes():
        raise OSError("image data is missing")
    return first


def _is_camera_raw(image: Image.Image) -> bool:
    """Return whether the file is a TIFF whose first image is only the preview of a raw photo (DNG, NEF, ARW)."""
    tags = getattr(image, "tag_v2", {})
    is_reduced = bool(tags.get(NEW_SUBFILE_TYPE, 0) & 1)
    return DNG_VERSION in tags or (is_reduced and SUBIFD in tags)


def _in_srgb(image: Image.Image) -> Image.Image:
    """Return the image with its ICC profile applied, as RGB or RGBA.

    A profile that cannot be read, or describes pixels of another kind, is ignored.
    """
    if "icc_profile" not in image.info:
        return image
    cms: Any = ImageCms  # lacks types
    try:
        profile = cms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        colours, alpha = _separated(image, profile.profile.xcolor_space.strip())
        srgb = cms.createProfile("sRGB")
        converted = cms.profileToProfile(colours, profile, srgb, outputMode="RGB") if colours else None
    except (ImageCms.PyCMSError, *_DAMAGED):
        return image
    if converted is None:
        return image
    converted.info = {}
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def _separated(image: Image.Image, colour_space: str) -> tuple[Image.Image | None, Image.Image | None]:
    """Return the colours that a profile for `RGB`, `GRAY` or `CMYK` applies to, None if it does not, and the alpha."""
    is_grey = image.mode in ("1", "L", "LA")
    if colour_space == "CMYK":
        return (image if image.mode == "CMYK" else None), None
    if image.mode == "CMYK" or colour_space not in ("RGB", "GRAY") or (colour_space == "GRAY" and not is_grey):
        return None, None
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    return image.convert("L" if colour_space == "GRAY" else "RGB"), alpha


def _check_pixels(image: Image.Image, field: str) -> None:
    if image.mode not in MODES and not image.mode.startswith("I;16"):
        raise InvalidRequest.field(
            field, f"has pixels of the mode {image.mode}; only 8 or 16 bits per channel are accepted"
        )


def _upright(image: Image.Image, *, in_place: bool = False) -> Image.Image:
    """Return a copy, or the image itself, rotated by its EXIF data if readable.

    Its only metadata are the transparent colour and the ICC profile.
    """
    try:
        rotated = ImageOps.exif_transpose(image, in_place=in_place) or image
    except _DAMAGED:
        rotated = image if in_place else image.copy()
    rotated.info = {name: value for name, value in rotated.info.items() if name in ("transparency", "icc_profile")}
    return rotated


def _eight_bits(image: Image.Image, field: str) -> Image.Image:
    _check_pixels(image, field)
    if image.mode in MODES:
        return image
    grey = image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")  # 65535 is 255
    grey.info.pop("transparency", None)  # a 16-bit value, which may share its eight bits with others
    return grey


def _composited(image: Image.Image, colour: str) -> Image.Image:
    ground = Image.new("RGBA", image.size, colour)
    return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")


def _brightness(mask: Image.Image) -> Image.Image:
    if not mask.has_transparency_data:
        return mask.convert("RGB").convert("L")
    grey = _composited(mask, "black").convert("L")
    alpha = mask.convert("RGBA").getchannel("A")
    is_opaque = alpha.getextrema() == (255, 255)
    return grey if is_opaque or grey.getbbox() is not None else alpha


def _edge_colour(image: Image.Image) -> tuple[int, ...]:
    """Return the mean of the outermost pixels."""
    edge = Image.new("L", image.size)
    ImageDraw.Draw(edge).rectangle((0, 0, image.width - 1, image.height - 1), outline=255)
    return tuple(round(mean) for mean in ImageStat.Stat(image, mask=edge).mean)


def _fitted(
    image: Image.Image,
    width: int,
    height: int,
    fit: Fit,
    resampling: Image.Resampling,
    bars: int | None,
) -> Image.Image:
    """Fit as `fit` says. `bars` is the grey level of the bars; None means the mean colour of the image's edge."""
    if fit == "stretch":
        return image.resize((width, height), resampling)
    across, down = width / image.width, height / image.height
    if fit == "cover":
        # Crop while scaling: a long strip would be enormous at full length.
        scale = max(across, down)
        left = max(0.0, (image.width - width / scale) / 2)
        top = max(0.0, (image.height - height / scale) / 2)
        box = (left, top, image.width - left, image.height - top)
        return image.resize((width, height), resampling, box=box)
    scale = min(across, down)
    inner = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), resampling)
    whole = Image.new(image.mode, (width, height), _edge_colour(inner) if bars is None else bars)
    whole.paste(inner, ((width - inner.width) // 2, (height - inner.height) // 2))
    return whole

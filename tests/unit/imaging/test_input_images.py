"""Any image file becomes the pixels that a request needs, or a sentence about what is wrong with it."""

import contextlib
import io
import random
import zlib
from functools import cache
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from pillow_heif import register_heif_opener

from tests.unit.imaging import icc_profiles
from zcore.errors import InvalidRequest
from zcore.image_files import input_images
from zcore.image_files.input_images import FORMATS, fit_image, fit_mask, image_format
from zcore.request import Fit, RequestLimits

FITS = get_args(Fit)
RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
NOISE = Image.frombytes("RGB", (96, 64), random.Random(5).randbytes(96 * 64 * 3))


def open_image(content: bytes, field: str) -> Image.Image:
    """Open an image under the default limits."""
    return input_images.open_image(content, field, RequestLimits().max_input_pixels)


def file(image: Image.Image, format: str, **options: Any) -> bytes:
    register_heif_opener()
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@cache
def noise_file(format: str) -> bytes:
    return file(NOISE, format)


def halves(mode: str, first: Any, second: Any) -> Image.Image:
    """Return 64x64 pixels, `first` on the left and `second` on the right."""
    image = Image.new(mode, (64, 64), first)
    image.paste(second, (32, 0, 64, 64))
    return image


def two_pixels(image: Image.Image) -> list[Any]:
    """Return one pixel from the left and one from the right."""
    return [image.getpixel((8, 32)), image.getpixel((56, 32))]


@pytest.mark.parametrize("fit", FITS)
def test_an_image_of_the_right_size_keeps_every_pixel(fit: Fit) -> None:
    fitted = fit_image(NOISE, 96, 64, fit)
    assert (fitted.mode, fitted.tobytes()) == ("RGB", NOISE.tobytes())


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([64, 80, 208]), st.sampled_from([64, 96, 240]))
def test_any_size_becomes_exactly_the_requested_size(width: int, height: int, to_width: int, to_height: int) -> None:
    image = Image.new("RGB", (width, height), (12, 34, 56))
    for fit in FITS:
        fitted = fit_image(image, to_width, to_height, fit)
        assert fitted.size == (to_width, to_height)
        assert fitted.getextrema() == ((12, 12), (34, 34), (56, 56))
        assert fit_mask(image, to_width, to_height, fit).size == (to_width, to_height)


def test_the_longest_strip_is_no_more_work_than_other_images() -> None:
    strip = Image.new("L", (1_000_000, 1), 77)
    for fit in FITS:
        assert fit_image(strip, 1024, 1024, fit).size == (1024, 1024)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (halves("RGB", RED, BLUE), [RED, BLUE]),
        (halves("RGBA", (*RED, 0), (*BLUE, 255)), [WHITE, BLUE]),
        (halves("RGBA", (0, 0, 0, 128), (*BLUE, 255)), [(127, 127, 127), BLUE]),
        (halves("LA", (0, 0), (50, 255)), [WHITE, (50, 50, 50)]),
        (halves("RGBA", (*RED, 255), (*BLUE, 0)).convert("PA"), [RED, WHITE]),
        (halves("L", 0, 200), [BLACK, (200, 200, 200)]),
        (halves("1", 0, 1), [BLACK, WHITE]),
        (halves("RGB", RED, BLUE).convert("P"), [RED, BLUE]),
        (halves("CMYK", (0, 255, 255, 0), (255, 255, 0, 0)), [RED, BLUE]),
        (halves("I;16", 257 * 10, 257 * 200), [(10, 10, 10), (200, 200, 200)]),
        (halves("I;16", 0, 65535), [BLACK, WHITE]),
        (halves("I;16B", 0, 65535), [BLACK, WHITE]),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_every_mode_becomes_the_visible_colour(image: Image.Image, expected: list[Any]) -> None:
    fitted = fit_image(image, 64, 64, "cover")
    assert fitted.mode == "RGB"
    assert two_pixels(fitted) == expected


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_the_colour_marked_as_transparent_is_white(mode: str) -> None:
    image = halves("L", 0, 90).convert(mode)
    key = {"P": image.getpixel((0, 0)), "L": 0, "RGB": BLACK}[mode]
    assert two_pixels(fit_image(open_image(file(image, "PNG", transparency=key), "image"), 64, 64, "cover")) == [
        WHITE,
        (90, 90, 90),
    ]


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_survives_a_file(format: str) -> None:
    image = open_image(file(halves("I;16", 257 * 10, 257 * 200), format), "image")
    assert two_pixels(fit_image(image, 64, 64, "cover")) == [(10, 10, 10), (200, 200, 200)]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_defined_white_level_are_refused(mode: str) -> None:
    image = Image.new(mode, (64, 64))
    for refuse, field in (
        (lambda: open_image(file(image, "TIFF"), "image"), "image"),
        (lambda: fit_image(image, 64, 64, "cover"), "image"),
        (lambda: fit_mask(image, 64, 64, "cover"), "mask"),
    ):
        with pytest.raises(InvalidRequest, match=f"^{field}: has pixels of the mode {mode}; only 8 or 16 bits"):
            refuse()


def test_cover_crops_to_the_middle() -> None:
    image = Image.new("RGB", (192, 64), RED)
    image.paste(GREEN, (64, 0, 128, 64))
    fitted = fit_image(image, 64, 64, "cover")
    assert fitted.getextrema() == ((0, 0), (255, 255), (0, 0))


def test_contain_shows_the_whole_image_between_bars_in_the_colour_of_its_edge() -> None:
    image = Image.new("RGB", (128, 64), (40, 80, 120))
    image.paste(GREEN, (32, 16, 96, 48))
    fitted = fit_image(image, 64, 64, "contain")
    assert [fitted.getpixel((32, y)) for y in (0, 15, 32, 48, 63)] == [
        (40, 80, 120), (40, 80, 120), GREEN, (40, 80, 120), (40, 80, 120),
    ]  # fmt: skip


def test_stretch_ignores_proportions() -> None:
    image = halves("RGB", RED, BLUE).resize((256, 64), Image.Resampling.NEAREST)
    assert two_pixels(fit_image(image, 64, 64, "stretch")) == [RED, BLUE]


AS_STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""How a camera held in each EXIF orientation stores an image that is seen upright (TIFF 6.0, tag 274)."""


@pytest.mark.parametrize("orientation", AS_STORED)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF", "HEIF"])
def test_an_image_is_rotated_by_its_orientation(format: str, orientation: int) -> None:
    """HEIF files state the orientation in the container; their EXIF repeats it and must not rotate them again."""
    upright = Image.new("RGB", (128, 64), RED)
    upright.paste(GREEN, (64, 0, 128, 32))
    upright.paste(BLUE, (0, 32, 64, 64))
    stored_as = AS_STORED[orientation]
    stored = upright if stored_as is None else upright.transpose(stored_as)
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = open_image(file(stored, format, exif=exif.tobytes()), "image")
    assert opened.size == (128, 64)
    for x, y in ((32, 16), (96, 16), (32, 48), (96, 48)):
        seen, expected = opened.convert("RGB").getpixel((x, y)), upright.getpixel((x, y))
        assert all(abs(one - other) < 40 for one, other in zip(seen, expected, strict=True)), (x, y)
    assert fit_image(opened, 128, 64, "cover").tobytes() == opened.convert("RGB").tobytes(), "not rotated again"


def test_an_image_with_damaged_exif_is_not_rotated() -> None:
    image = open_image(file(NOISE, "PNG", exif=b"Exif\0\0XX\0*\0\0\0\x08"), "image")
    assert fit_image(image, 96, 64, "cover").tobytes() == NOISE.tobytes()


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "AVIF"])
def test_of_an_animation_the_first_frame_is_used(format: str) -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in (RED, BLUE)]
    image = open_image(file(frames[0], format, save_all=True, append_images=frames[1:]), "image")
    red, _, blue = fit_image(image, 64, 64, "cover").getpixel((5, 5))
    assert red > 240
    assert blue < 15


@pytest.mark.parametrize("format", FORMATS)
def test_every_accepted_format_is_opened(format: str) -> None:
    assert open_image(file(NOISE, format), "image").size == (96, 64)


@pytest.mark.parametrize("brand", [b"heic", b"mif1"])
def test_a_heic_is_opened_whatever_its_brand(brand: bytes) -> None:
    content = file(Image.new("RGB", (96, 64), (200, 60, 60)), "HEIF")
    image = open_image(content[:8] + brand + content[12:], "image")
    assert image.size == (96, 64)
    assert image_format(content) == "heif"
    assert all(abs(one - other) < 6 for one, other in zip(image.getpixel((9, 9)), (200, 60, 60), strict=True))


@pytest.mark.parametrize("content", [b"", b"hello", file(NOISE, "PPM")])
def test_a_file_that_is_not_an_accepted_image_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidRequest, match=r"^mask: is not a complete image file; PNG, JPEG, .* are accepted$"):
        open_image(content, "mask")


def camera_raw(**tags: Any) -> bytes:
    """Return a TIFF whose first image is the preview of a raw photo."""
    directory = ImageFileDirectory_v2()
    directory[254] = 1
    for number, value in tags.items():
        directory[int(number.removeprefix("tag_"))] = value
    return file(NOISE, "TIFF", tiffinfo=directory)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"%PDF-1.7 ...", "a PDF document"),
        (file(NOISE, "PDF"), "a PDF document"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"),
        (b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- a drawing -->\n<svg/>', "an SVG drawing"),
        (b"<!DOCTYPE html><title>Not found</title>", "a web page"),
        (b"\xff\x0a\xfa\x7f", "a JPEG XL image"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL image"),
        (file(NOISE, "JPEG2000"), "a JPEG 2000 image"),
        (file(NOISE, "ICO"), r"an icon \(ICO\)"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0", "a video"),
        (b"\0\0\0\x14ftypqt  \0\0\0\0", "a video"),
        (b"\x1a\x45\xdf\xa3\x9fB\x86\x81\x01", "a video"),
        (b"\0\0\0\x18ftypcrx \0\0\0\x01", "a camera raw file"),
        (b"II*\0\x10\0\0\0CR\x02\0", "a camera raw file"),
        (camera_raw(tag_50706=b"\x01\x04\0\0"), "a camera raw file"),
        (camera_raw(tag_330=8), "a camera raw file"),
    ],
)
def test_the_error_names_what_is_not_an_accepted_image(content: bytes, name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^image: is {name}; PNG, JPEG, WebP, AVIF, HEIC, .* are accepted$"):
        open_image(content, "image")


@pytest.mark.parametrize("format", FORMATS)
def test_a_truncated_image_is_refused(format: str) -> None:
    content = file(NOISE, format)
    with pytest.raises(InvalidRequest, match=r"^image: .*(not a complete image|damaged or incomplete)"):
        open_image(content[: len(content) // 2], "image")


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 30, "subsampling": 0}], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_without_its_end_marker_is_opened(mode: str, options: dict[str, Any]) -> None:
    content = file(NOISE.convert(mode), "JPEG", **options)
    whole = open_image(content, "image").tobytes()
    assert content.endswith(b"\xff\xd9")
    for complete in (content[:-1], content[:-2], content[:-2] + b"\0" * 20):
        assert open_image(complete, "image").tobytes() == whole


@given(st.sampled_from([{}, {"progressive": True}]), st.integers(1, 3000))
def test_a_jpeg_is_opened_only_if_no_pixel_is_missing(options: dict[str, Any], missing: int) -> None:
    content = file(NOISE, "JPEG", **options)
    with contextlib.suppress(InvalidRequest):
        assert open_image(content[:-missing], "image").tobytes() == open_image(content, "image").tobytes()


WITH_PROFILE = ["PNG", "JPEG", "WEBP", "AVIF", "TIFF", "HEIF"]


@pytest.mark.parametrize("format", WITH_PROFILE)
def test_a_photo_in_display_p3_becomes_srgb(format: str) -> None:
    photo = Image.new("RGB", (96, 64), (200, 60, 60))
    options: dict[str, Any] = {"lossless": True} if format == "WEBP" else {"quality": 100}
    opened = open_image(file(photo, format, icc_profile=icc_profiles.display_p3(), **options), "image")
    colour = fit_image(opened, 96, 64, "cover").getpixel((9, 9))
    assert all(abs(one - other) <= 2 for one, other in zip(colour, (217, 42, 52), strict=True)), colour


@pytest.mark.parametrize("mode", ["RGBA", "PA"])
def test_a_profile_leaves_transparency_as_it_is(mode: str) -> None:
    image = halves("RGBA", (200, 60, 60, 255), (200, 60, 60, 0)).convert(mode)
    image.info["icc_profile"] = icc_profiles.display_p3()
    assert two_pixels(fit_image(image, 64, 64, "cover")) == [(217, 42, 52), WHITE]


def palette_image() -> Image.Image:
    image = Image.new("P", (64, 64), 0)
    image.putpalette([200, 60, 60])
    return image


@pytest.mark.parametrize(
    ("image", "profile", "expected"),
    [
        (palette_image(), icc_profiles.display_p3(), (217, 42, 52)),
        (Image.new("L", (64, 64), 128), icc_profiles.linear_grey(), (188, 188, 188)),
        (Image.new("LA", (64, 64), (128, 255)), icc_profiles.linear_grey(), (188, 188, 188)),
        (Image.new("I;16", (64, 64), 128 * 257), icc_profiles.linear_grey(), (188, 188, 188)),
        (Image.new("CMYK", (64, 64), (255, 0, 0, 0)), icc_profiles.cmyk((62, -31, -64)), (0, 169, 255)),
        (Image.new("CMYK", (64, 64), (0, 0, 0, 0)), icc_profiles.cmyk((62, -31, -64)), WHITE),
        (Image.new("L", (64, 64), 128), icc_profiles.display_p3(), (128, 128, 128)),
        (Image.new("RGB", (64, 64), (9, 128, 0)), icc_profiles.linear_grey(), (9, 128, 0)),
        (Image.new("RGB", (64, 64), (9, 128, 0)), icc_profiles.cmyk((62, -31, -64)), (9, 128, 0)),
        (Image.new("RGB", (64, 64), (9, 128, 0)), b"not a profile", (9, 128, 0)),
        (Image.new("RGB", (64, 64), (9, 128, 0)), icc_profiles.display_p3()[:200], (9, 128, 0)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_a_profile_is_applied_if_it_is_readable_and_describes_these_pixels(
    image: Image.Image, profile: bytes, expected: tuple[int, int, int]
) -> None:
    image.info["icc_profile"] = profile
    assert fit_image(image, 64, 64, "cover").getpixel((9, 9)) == expected


def test_an_image_whose_profile_is_srgb_keeps_every_pixel() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = open_image(file(NOISE, "PNG", icc_profile=srgb), "image")
    assert fit_image(image, 96, 64, "cover").tobytes() == NOISE.tobytes()


def test_a_profile_is_not_applied_to_a_mask() -> None:
    mask = open_image(file(halves("L", 0, 128), "PNG", icc_profile=icc_profiles.linear_grey()), "mask")
    assert two_pixels(fit_mask(mask, 64, 64, "cover")) == [0, 128]


@pytest.mark.parametrize("side", [7100, 8193, 12_000, 60_000])
def test_an_image_that_is_too_large_is_refused_before_it_is_decoded(side: int) -> None:
    content = bytearray(file(NOISE, "PNG"))
    content[16:24] = side.to_bytes(4) * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4)
    with pytest.raises(InvalidRequest, match=r"^image: is .*; at most 50000000 pixels are accepted$"):
        open_image(bytes(content), "image")


@given(st.data())
def test_any_damaged_file_gives_an_image_or_a_sentence(data: st.DataObject) -> None:
    content = bytearray(noise_file(data.draw(st.sampled_from(FORMATS))))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, min(len(content), 600) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(InvalidRequest):
        assert fit_image(open_image(bytes(content), "image"), 64, 64, "contain").size == (64, 64)


@pytest.mark.parametrize(
    ("mask", "regenerated"),
    [
        (halves("L", 0, 255), [0, 255]),
        (halves("1", 0, 1), [0, 255]),
        (halves("RGB", BLACK, WHITE), [0, 255]),
        (halves("RGB", BLACK, WHITE).convert("P"), [0, 255]),
        (halves("I;16", 0, 65535), [0, 255]),
        (halves("L", 0, 100), [0, 100]),
        (halves("RGBA", (*BLACK, 0), (*WHITE, 255)), [0, 255]),
        (halves("RGBA", (*WHITE, 0), (*WHITE, 128)), [0, 128]),
        (halves("RGBA", (*BLACK, 0), (*BLACK, 255)), [0, 255]),
        (halves("LA", (0, 0), (0, 90)), [0, 90]),
        (halves("RGBA", (*BLACK, 255), (*WHITE, 255)), [0, 255]),
        (halves("RGBA", (*BLACK, 255), (*BLACK, 255)), [0, 0]),
        (halves("RGBA", (*BLACK, 0), (*BLACK, 0)), [0, 0]),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else str(value),
)
def test_white_is_regenerated_and_so_are_opaque_pixels_of_a_mask_of_only_transparency(
    mask: Image.Image, regenerated: list[int]
) -> None:
    fitted_mask = fit_mask(mask, 64, 64, "cover")
    assert fitted_mask.mode == "L"
    assert two_pixels(fitted_mask) == regenerated


def test_a_mask_aligns_with_its_image_and_the_bars_are_regenerated() -> None:
    mask = Image.new("L", (128, 64), 0)
    fitted_mask = fit_mask(mask, 64, 64, "contain")
    assert [fitted_mask.getpixel((32, y)) for y in (0, 15, 16, 47, 48, 63)] == [255, 255, 0, 0, 255, 255]
    assert fit_mask(mask, 64, 64, "cover").getextrema() == (0, 0)


@pytest.mark.parametrize("format", FORMATS)
def test_the_format_of_a_file_is_that_of_its_media_type(format: str) -> None:
    assert image_format(file(NOISE, format)) == format.lower()


def test_a_cameras_file_with_several_images_is_a_jpeg() -> None:
    content = file(NOISE, "MPO", save_all=True, append_images=[NOISE])
    assert open_image(content, "image").size == NOISE.size
    assert image_format(content) == "jpeg"

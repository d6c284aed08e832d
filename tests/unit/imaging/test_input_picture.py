"""Whatever picture a user has becomes the pixels a request needs, or a sentence about what is wrong with it."""

import contextlib
import io
import random
import zlib
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from zcore.errors import InvalidRequest
from zcore.imaging.input_picture import FORMATS, PIXELS_AT_MOST, fitted, mask_fitted, open_picture
from zcore.request import Fit

FITS = get_args(Fit)
RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
NOISE = Image.frombytes("RGB", (96, 64), random.Random(5).randbytes(96 * 64 * 3))


def file(image: Image.Image, format: str, **options: Any) -> bytes:  # noqa: A002
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def halves(mode: str, first: Any, second: Any) -> Image.Image:
    """64x64, `first` on the left and `second` on the right."""
    image = Image.new(mode, (64, 64), first)
    image.paste(second, (32, 0, 64, 64))
    return image


def two_pixels(image: Image.Image) -> list[Any]:
    """One on the left, one on the right."""
    return [image.getpixel((8, 32)), image.getpixel((56, 32))]


@pytest.mark.parametrize("fit", FITS)
def test_a_picture_that_fits_keeps_every_pixel(fit: Fit) -> None:
    picture = fitted(NOISE, 96, 64, fit)
    assert (picture.mode, picture.tobytes()) == ("RGB", NOISE.tobytes())


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([64, 80, 208]), st.sampled_from([64, 96, 240]))
def test_any_size_comes_to_just_the_size_asked_for(width: int, height: int, to_width: int, to_height: int) -> None:
    image = Image.new("RGB", (width, height), (12, 34, 56))
    for fit in FITS:
        picture = fitted(image, to_width, to_height, fit)
        assert picture.size == (to_width, to_height)
        assert picture.getextrema() == ((12, 12), (34, 34), (56, 56))
        assert mask_fitted(image, to_width, to_height, fit).size == (to_width, to_height)


def test_a_strip_as_long_as_may_be_is_no_more_work_than_another() -> None:
    strip = Image.new("L", (PIXELS_AT_MOST // 64, 1), 77)
    for fit in FITS:
        assert fitted(strip, 1024, 1024, fit).size == (1024, 1024)


@pytest.mark.parametrize(
    ("image", "seen"),
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
def test_every_kind_of_pixel_becomes_the_colour_that_is_seen(image: Image.Image, seen: list[Any]) -> None:
    picture = fitted(image, 64, 64, "cover")
    assert picture.mode == "RGB"
    assert two_pixels(picture) == seen


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_one_colour_that_stands_for_transparency_is_white(mode: str) -> None:
    image = halves("L", 0, 90).convert(mode)
    key = {"P": image.getpixel((0, 0)), "L": 0, "RGB": BLACK}[mode]
    assert two_pixels(fitted(open_picture(file(image, "PNG", transparency=key), "image"), 64, 64, "cover")) == [
        WHITE,
        (90, 90, 90),
    ]


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_survives_a_file(format: str) -> None:  # noqa: A002
    image = open_picture(file(halves("I;16", 257 * 10, 257 * 200), format), "image")
    assert two_pixels(fitted(image, 64, 64, "cover")) == [(10, 10, 10), (200, 200, 200)]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_whose_white_nobody_knows_are_refused(mode: str) -> None:
    image = Image.new(mode, (64, 64))
    for refuse, field in (
        (lambda: open_picture(file(image, "TIFF"), "image"), "image"),
        (lambda: fitted(image, 64, 64, "cover"), "image"),
        (lambda: mask_fitted(image, 64, 64, "cover"), "mask"),
    ):
        with pytest.raises(InvalidRequest, match=f"^{field}: has pixels of the kind {mode}; 8 or 16 bits"):
            refuse()


def test_cover_cuts_the_middle_out() -> None:
    image = Image.new("RGB", (192, 64), RED)
    image.paste(GREEN, (64, 0, 128, 64))
    picture = fitted(image, 64, 64, "cover")
    assert picture.getextrema() == ((0, 0), (255, 255), (0, 0))


def test_contain_shows_all_between_bars_of_the_edges_colour() -> None:
    image = Image.new("RGB", (128, 64), (40, 80, 120))
    image.paste(GREEN, (32, 16, 96, 48))
    picture = fitted(image, 64, 64, "contain")
    assert [picture.getpixel((32, y)) for y in (0, 15, 32, 48, 63)] == [
        (40, 80, 120), (40, 80, 120), GREEN, (40, 80, 120), (40, 80, 120),
    ]  # fmt: skip


def test_stretch_ignores_proportions() -> None:
    image = halves("RGB", RED, BLUE).resize((256, 64), Image.Resampling.NEAREST)
    assert two_pixels(fitted(image, 64, 64, "stretch")) == [RED, BLUE]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
def test_a_picture_is_turned_as_its_camera_says(format: str) -> None:  # noqa: A002
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn a quarter clockwise
    image = halves("RGB", RED, BLUE).resize((128, 64), Image.Resampling.NEAREST)
    opened = open_picture(file(image, format, exif=exif), "image")
    assert opened.size == (64, 128)
    red, _, blue = opened.convert("RGB").getpixel((32, 20))  # type: ignore[misc]
    assert red > 200 > 50 > blue
    assert fitted(opened, 64, 128, "cover").tobytes() == opened.convert("RGB").tobytes(), "and not turned again"


def test_a_picture_whose_exif_is_broken_stays_as_it_is() -> None:
    image = open_picture(file(NOISE, "PNG", exif=b"Exif\0\0XX\0*\0\0\0\x08"), "image")
    assert fitted(image, 96, 64, "cover").tobytes() == NOISE.tobytes()


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "AVIF"])
def test_of_a_picture_that_moves_the_first_is_taken(format: str) -> None:  # noqa: A002
    frames = [Image.new("RGB", (64, 64), colour) for colour in (RED, BLUE)]
    image = open_picture(file(frames[0], format, save_all=True, append_images=frames[1:]), "image")
    red, _, blue = fitted(image, 64, 64, "cover").getpixel((5, 5))  # type: ignore[misc]
    assert red > 240
    assert blue < 15


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_that_is_taken_is_opened(format: str) -> None:  # noqa: A002
    assert open_picture(file(NOISE, format), "image").size == (96, 64)


@pytest.mark.parametrize("content", [b"", b"hello", b"%PDF-1.7 ...", file(NOISE, "PPM"), file(NOISE, "ICO")])
def test_what_is_no_picture_of_a_kind_that_is_taken_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidRequest, match=r"^mask: is not a picture, or not a whole one; PNG, JPEG, .* are taken$"):
        open_picture(content, "mask")


@pytest.mark.parametrize("format", FORMATS)
def test_a_picture_that_breaks_off_is_refused(format: str) -> None:  # noqa: A002
    content = file(NOISE, format)
    with pytest.raises(InvalidRequest, match=r"^image: .*(not a whole one|breaks off)"):
        open_picture(content[: len(content) // 2], "image")


@pytest.mark.parametrize("side", [8193, 12_000, 60_000])
def test_a_picture_too_large_is_refused_before_it_is_decoded(side: int) -> None:
    content = bytearray(file(NOISE, "PNG"))
    content[16:24] = side.to_bytes(4) * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4)
    with pytest.raises(InvalidRequest, match=r"^image: is .*; at most 67108864 pixels are opened here$"):
        open_picture(bytes(content), "image")


@given(st.data())
def test_no_file_is_too_broken_for_a_sentence(data: st.DataObject) -> None:
    content = bytearray(file(NOISE, data.draw(st.sampled_from(FORMATS))))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, min(len(content), 600) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(InvalidRequest):
        assert fitted(open_picture(bytes(content), "image"), 64, 64, "contain").size == (64, 64)


@pytest.mark.parametrize(
    ("mask", "painted_anew"),
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
def test_white_is_painted_anew_and_so_is_what_is_opaque_in_a_mask_of_transparency_alone(
    mask: Image.Image, painted_anew: list[int]
) -> None:
    fitted_mask = mask_fitted(mask, 64, 64, "cover")
    assert fitted_mask.mode == "L"
    assert two_pixels(fitted_mask) == painted_anew


def test_a_mask_lies_over_its_picture_and_the_bars_are_painted_anew() -> None:
    mask = Image.new("L", (128, 64), 0)
    fitted_mask = mask_fitted(mask, 64, 64, "contain")
    assert [fitted_mask.getpixel((32, y)) for y in (0, 15, 16, 47, 48, 63)] == [255, 255, 0, 0, 255, 255]
    assert mask_fitted(mask, 64, 64, "cover").getextrema() == (0, 0)

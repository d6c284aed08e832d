"""A picture says how it was made, and its bytes depend on nothing else."""

import hashlib
import io

import pytest
from PIL import Image

from zcore.imaging.encode import encode_png, read_parameters
from zcore.request import GenerationRequest

MADE_BY = {"engine": "1.2.3", "model_revision": "abc", "torch": "2.13.0"}
REQUEST = GenerationRequest(
    prompt='一只猫 🐈 <b>\n"quoted"', template="photography", seed=2**63 - 1, n=3, width=64, height=80
)


@pytest.fixture
def picture() -> Image.Image:
    """Every pixel another."""
    return Image.frombytes("RGB", (64, 80), bytes(index % 251 for index in range(64 * 80 * 3)))


def test_the_pixels_and_the_parameters_come_back(picture: Image.Image) -> None:
    encoded = encode_png(picture, REQUEST, 2, MADE_BY)
    with Image.open(io.BytesIO(encoded.content)) as reread:
        assert reread.format == "PNG"
        assert reread.tobytes() == picture.tobytes()
    parameters = read_parameters(encoded.content)
    assert parameters is not None
    assert parameters.index == 2
    assert parameters.made_by == MADE_BY
    assert parameters.request.prompt == REQUEST.prompt
    assert parameters.request.template == "photography"


def test_the_embedded_request_is_of_this_picture_alone(picture: Image.Image) -> None:
    parameters = read_parameters(encode_png(picture, REQUEST, 2, MADE_BY).content)
    assert parameters is not None
    assert parameters.request.seed == REQUEST.seed_of(2) == 1
    assert parameters.request.n == 1


def test_what_is_told_about_the_file_is_true(picture: Image.Image) -> None:
    encoded = encode_png(picture, REQUEST, 0, MADE_BY)
    assert (encoded.format, encoded.width, encoded.height) == ("png", 64, 80)
    assert encoded.sha256 == hashlib.sha256(encoded.content).hexdigest()


def test_the_same_picture_gives_the_same_bytes(picture: Image.Image) -> None:
    assert encode_png(picture, REQUEST, 0, MADE_BY) == encode_png(
        picture.copy(), REQUEST, 0, dict(reversed(MADE_BY.items()))
    )
    assert encode_png(picture, REQUEST, 0, MADE_BY) != encode_png(picture, REQUEST, 1, MADE_BY)


def test_a_picture_from_elsewhere_has_no_parameters(picture: Image.Image) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    stripped = buffer.getvalue()
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG")
    for content in (stripped, buffer.getvalue(), b"", b"\x89PNG\r\n\x1a\n", stripped[:-40]):
        assert read_parameters(content) is None


@pytest.mark.parametrize("claim", ["", "{", "[]", '{"request": {}}', '{"request": {"prompt": "x", "width": 7}}'])
def test_parameters_that_make_no_sense_are_none(picture: Image.Image, claim: str) -> None:
    from PIL import PngImagePlugin

    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("zimage", claim)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=chunks)
    assert read_parameters(buffer.getvalue()) is None

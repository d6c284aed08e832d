"""An image file records how it was generated, and its bytes depend on nothing else."""

import hashlib
import io
import zlib
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from zcore.image_files import xmp
from zcore.image_files.writing import read_parameters, write_image
from zcore.request import PROMPT_LIMIT_CHARACTERS, UNWRITABLE, GenerationRequest, OutputFormat

FORMATS = get_args(OutputFormat)
MADE_BY = {"engine": "1.2.3", "model_revision": "abc", "torch": "2.13.0"}
INPUTS = {"image": "a" * 64, "mask": "b" * 64}
REQUEST = GenerationRequest(
    prompt='一只猫 🐈 <b> & ]]> \ufffe\uffff\x01\n"quoted"',
    template="photography",
    seed=2**63 - 1,
    n=3,
    width=64,
    height=80,
)
IMAGE = Image.frombytes("RGB", (64, 80), bytes(index % 251 for index in range(64 * 80 * 3)))
"""An image of varied pixels."""


def stored_as(file_format: str, **changed: Any) -> GenerationRequest:
    return msgspec.structs.replace(REQUEST, format=file_format, **changed)


@pytest.fixture(params=FORMATS)
def request_of_each(request: pytest.FixtureRequest) -> GenerationRequest:
    """The request, in every format."""
    return stored_as(request.param)


def plain(format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    IMAGE.save(buffer, format, **options)
    return buffer.getvalue()


def test_the_parameters_are_read_back(request_of_each: GenerationRequest) -> None:
    encoded = write_image(IMAGE, request_of_each, 2, MADE_BY, INPUTS)
    parameters = read_parameters(encoded.content)
    assert parameters is not None
    assert parameters.index == 2
    assert parameters.made_by == MADE_BY
    assert parameters.inputs == INPUTS
    assert parameters.request.prompt == REQUEST.prompt
    assert parameters.request.template == "photography"


def test_the_embedded_request_is_for_this_image_alone(request_of_each: GenerationRequest) -> None:
    parameters = read_parameters(write_image(IMAGE, request_of_each, 2, MADE_BY).content)
    assert parameters is not None
    assert parameters.request == msgspec.structs.replace(request_of_each, seed=REQUEST.seed_of(2), n=1)
    assert parameters.request.seed == 1


def test_a_png_has_exactly_the_same_pixels() -> None:
    with Image.open(io.BytesIO(write_image(IMAGE, REQUEST, 0, MADE_BY).content)) as reread:
        assert reread.tobytes() == IMAGE.tobytes()


@pytest.mark.parametrize("format", ["jpeg", "webp", "avif"])
def test_the_other_formats_follow_the_requested_quality(format: str) -> None:
    sizes = [len(write_image(IMAGE, stored_as(format, quality=q), 0, MADE_BY).content) for q in (20, 90)]
    assert sizes[0] < 0.75 * sizes[1]


def test_the_file_is_described_correctly(request_of_each: GenerationRequest) -> None:
    encoded = write_image(IMAGE, request_of_each, 0, MADE_BY)
    with Image.open(io.BytesIO(encoded.content)) as reread:
        assert reread.format is not None
        assert (encoded.format, encoded.width, encoded.height) == (reread.format.lower(), 64, 80)
        assert encoded.media_type == reread.get_format_mimetype()
    assert encoded.sha256 == hashlib.sha256(encoded.content).hexdigest()


def test_the_same_image_gives_the_same_bytes(request_of_each: GenerationRequest) -> None:
    def encoded(index: int = 0, made_by: dict[str, str] = MADE_BY, inputs: dict[str, str] = INPUTS) -> bytes:
        return write_image(IMAGE.copy(), request_of_each, index, made_by, inputs).content

    reordered = dict(reversed(MADE_BY.items())), dict(reversed(INPUTS.items()))
    assert encoded() == encoded(0, *reordered)
    assert len({encoded(), encoded(1), encoded(0, {}), encoded(inputs={})}) == 4


@pytest.mark.parametrize("character", ["\U0010fffd", "\x01", "&", '"'], ids=["4 bytes", "control", "markup", "quote"])
def test_the_longest_texts_fit_every_format(request_of_each: GenerationRequest, character: str) -> None:
    longest = character * PROMPT_LIMIT_CHARACTERS
    request = msgspec.structs.replace(
        request_of_each,
        prompt=longest,
        negative_prompt=longest,
        system_prompt=longest,
        thinking_content=longest,
        assistant_content=longest,
        seed=1,
        n=1,
    )
    content = write_image(IMAGE, request, 0, MADE_BY).content
    parameters = read_parameters(content)
    assert parameters is not None
    assert parameters.request == request
    with Image.open(io.BytesIO(content)) as reread:
        reread.load()


@given(st.text().filter(lambda text: text.strip() and not UNWRITABLE.search(text)), st.sampled_from(FORMATS))
def test_any_prompt_is_read_back(prompt: str, format: str) -> None:
    parameters = read_parameters(write_image(IMAGE, stored_as(format, prompt=prompt), 0, {}).content)
    assert parameters is not None
    assert parameters.request.prompt == prompt


def test_a_jpegs_packet_may_span_segments_in_any_order_but_must_be_complete() -> None:
    split = xmp.jpeg_packet("long " * 50_000, "a type")
    assert b"DigitalSourceType>a type<" in split.main
    with Image.open(io.BytesIO(plain("JPEG", xmp=split.main, extra=split.extensions))) as image:
        segments = [segment for name, segment in image.applist if name == "APP1"]
    assert len(segments) == 5
    assert xmp.text_in(split.main, reversed(segments)) == "long " * 50_000
    assert xmp.text_in(split.main, segments[1:]) is None


def test_a_packet_rewritten_by_another_program_is_read() -> None:
    attribute = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description xmlns:z="{xmp.NAMESPACE}" z:parameters="a &amp; b"/></rdf:RDF></x:xmpmeta>'
    )
    assert xmp.text_in(attribute.encode()) == "a & b"


def test_a_packet_with_entities_is_not_read() -> None:
    bomb = f'<!DOCTYPE x [<!ENTITY a "b">]><x xmlns:z="{xmp.NAMESPACE}" z:parameters="&a;"/>'
    assert xmp.text_in(bomb.encode()) is None
    assert xmp.text_in(bomb.encode("utf-16")) is None


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "AVIF", "GIF", "TIFF"])
def test_an_image_from_elsewhere_has_no_parameters(format: str) -> None:
    assert read_parameters(plain(format)) is None
    if format in ("JPEG", "WEBP", "AVIF"):
        for packet in (b"<x>", b"\xff", b"<x/>", xmp.packet("", None), xmp.packet("[" * 100_000, None)[:60_000]):
            assert read_parameters(plain(format, xmp=packet)) is None


@pytest.mark.parametrize("claim", ["", "{", "[]", '{"request": {}}', '{"request": {"prompt": "x", "width": 7}}'])
def test_invalid_parameters_are_none(claim: str) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("zimage", claim)
    assert read_parameters(plain("PNG", pnginfo=chunks)) is None
    assert read_parameters(plain("WEBP", xmp=xmp.packet(claim, None))) is None


def test_deeply_nested_json_is_none() -> None:
    nested = '{"request": ' + '{"layer_weights": ' * 100_000
    assert read_parameters(plain("WEBP", xmp=xmp.packet(nested, None))) is None
    assert read_parameters(plain("WEBP", xmp=xmp.packet('{"unknown": ' + "[" * 100_000, None))) is None


def test_an_image_larger_than_any_memory_is_none() -> None:
    content = bytearray(plain("PNG"))
    content[16:24] = (60_000).to_bytes(4) * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(content))
    assert read_parameters(bytes(content)) is None


@given(st.data())
def test_reading_parameters_never_fails(data: st.DataObject) -> None:
    content = bytearray(ENCODED[data.draw(st.sampled_from(FORMATS))])
    for _ in range(data.draw(st.integers(0, 8))):
        content[data.draw(st.integers(0, min(len(content), 2000) - 1))] = data.draw(st.integers(0, 255))
    read_parameters(bytes(content[: data.draw(st.integers(0, len(content)))]))


ENCODED = {name: write_image(IMAGE, stored_as(name), 0, MADE_BY).content for name in FORMATS}

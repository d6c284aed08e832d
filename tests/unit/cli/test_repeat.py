"""`zimage generate --from FILE` paints the same picture again, to the last bit of its file."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.unit.cli.conftest import Terminal
from zcore.imaging.encode import encode_image, read_parameters
from zcore.request import GenerationRequest

SMALL = ("--size", "64x64", "--steps", "2")


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_a_picture_and_a_later_one_of_several_are_repeated_bit_for_bit(suffix: str, zimage: Terminal) -> None:
    several = ("--n", "3", "--template", "art_oil", "--quality", "70", "--output", f"red.{suffix}")
    zimage.paint("a red circle", *SMALL, *several)
    for index in (0, 2):
        finished = zimage.paint("--from", f"red-{index}.{suffix}", "--output", f"again.{suffix}")
        assert finished.out.startswith(f"again.{suffix}  seed ")
        assert Path(f"again.{suffix}").read_bytes() == Path(f"red-{index}.{suffix}").read_bytes()


@pytest.mark.parametrize("suffix", ["png", "avif"])
def test_a_picture_that_began_from_another_finds_it_beside_itself_or_in_the_working_folder(
    suffix: str, zimage: Terminal
) -> None:
    Image.linear_gradient("L").resize((100, 80)).save("input.jpg")
    Image.radial_gradient("L").resize((100, 80)).save("mask.png")
    name = f"output.{suffix}"
    zimage.paint("a circle", "--img2img", "input.jpg", "--mask", "mask.png", "--steps", "2", "--output", name)
    made = Path(name).read_bytes()
    elsewhere = zimage.folder / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(name, elsewhere)
    zimage.paint("--from", f"elsewhere/{name}", "--output", f"again.{suffix}")
    assert Path(f"again.{suffix}").read_bytes() == made
    for file in ("input.jpg", "mask.png"):
        shutil.move(file, elsewhere)
    zimage.paint("--from", f"elsewhere/{name}", "--output", f"third.{suffix}")
    assert Path(f"third.{suffix}").read_bytes() == made


def test_an_input_that_is_gone_or_has_changed_has_to_be_passed(zimage: Terminal) -> None:
    Image.linear_gradient("L").save("input.png")
    zimage.paint("a circle", "--img2img", "input.png", *SMALL, "--seed", "1")
    shutil.copy("input.png", "moved.png")
    Image.radial_gradient("L").save("input.png")
    finished = zimage("generate", "--profile", "demo", "--from", "output.png", "--output", "again.png")
    assert finished.status == 2
    assert finished.err == (
        "zimage: --from: the picture began from given:input.png, which is not at hand unchanged; "
        "pass it with --img2img\n"
    )
    assert not Path("again.png").exists()
    zimage.paint("--from", "output.png", "--img2img", "moved.png", "--output", "again.png")
    with Image.open("output.png") as first, Image.open("again.png") as again:
        assert first.tobytes() == again.tobytes()


@pytest.mark.parametrize("address", ["https://example.org/cat.png", f"input:{'0' * 64}"])
def test_an_input_of_the_service_has_to_be_passed(address: str, zimage: Terminal) -> None:
    request = GenerationRequest(prompt="a circle", image=address, width=64, height=64)
    encoded = encode_image(Image.new("RGB", (64, 64)), request, 0, {}, {"image": "0" * 64})
    Path("served.png").write_bytes(encoded.content)
    finished = zimage("generate", "--profile", "demo", "--from", "served.png")
    assert finished.status == 2
    assert finished.err.startswith(f"zimage: --from: the picture began from {address}, which is not at hand")


def test_flags_that_are_settings_stand_over_what_the_picture_says_too(zimage: Terminal) -> None:
    def made(file: str) -> GenerationRequest:
        parameters = read_parameters(Path(file).read_bytes())
        assert parameters is not None
        return parameters.request

    zimage.paint("a red circle", *SMALL)
    skipping = ("--slg", "--slg-layers", "1,2")
    zimage.paint("--from", "output.png", *skipping, "--dype", "--tiled-vae", "--output", "more.png")
    more = made("more.png")
    assert (more.slg and more.slg.layers, more.dype is not None, more.tiled_vae) == ((1, 2), True, True)
    zimage.paint("--from", "more.png", "--no-slg", "--steps", "1", "--output", "less.png")
    less = made("less.png")
    assert (less.slg, less.dype, less.tiled_vae) == (None, more.dype, True)


def test_tiles_of_another_size_are_told(zimage: Terminal) -> None:
    zimage.paint("a red circle", "--size", "160x160", "--steps", "1", "--tiled-vae", "--tile-size", "128")
    finished = zimage("generate", "--profile", "demo", "--from", "output.png", "--output", "again.png")
    assert finished.status == 0
    assert finished.err == (
        "zimage: note: the picture may come out differently: "
        "vae_tiles was 128 px, overlapping by 64 px and is 512 px, overlapping by 64 px\n"
    )


def test_an_embedding_takes_the_place_of_all_that_was_written(zimage: Terminal) -> None:
    zimage.paint("a red circle", *SMALL, "--template", "art_oil", "--guidance-scale", "2", "--negative-prompt", "blue")
    assert zimage("encode", "--profile", "demo", "--output", "star.safetensors", "a green star").status == 0
    said = ("--embeddings", "star.safetensors", "--guidance-scale", "0", "--output", "star.png")
    assert zimage("generate", "--profile", "demo", "--from", "output.png", *said).status == 0
    made = read_parameters(Path("star.png").read_bytes())
    assert made is not None
    assert made.request.prompt.startswith("embedding ")
    assert (made.request.template, made.request.negative_prompt, made.request.steps) == (None, "", 2)


def test_other_flags_stand_over_what_the_picture_says(zimage: Terminal) -> None:
    zimage.paint("a red circle", "--width", "64", "--height", "80", "--steps", "2", "--seed", "7")
    zimage.paint("a blue star", "--from", "output.png", "--size", "96x64", "--n", "2", "--output", "blue.png")
    found = [read_parameters(Path(f"blue-{index}.png").read_bytes()) for index in (0, 1)]
    said = [(one.request.prompt, one.request.width, one.request.seed, one.index) for one in found if one]
    assert said == [("a blue star", 96, 7, 0), ("a blue star", 96, 8, 1)]
    zimage.paint("--from", "output.png", "--height", "64", "--output", "square.png")
    square = read_parameters(Path("square.png").read_bytes())
    assert square is not None
    assert (square.request.width, square.request.height, square.request.steps) == (64, 64, 2)


def test_what_paints_it_differently_than_then_is_told(zimage: Terminal) -> None:
    zimage.paint("a red circle", *SMALL)
    finished = zimage(
        "generate", "--profile", "demo", "--dtype", "bfloat16", "--from", "output.png", "--output", "a.jpg"
    )
    assert finished.status == 0
    assert "the picture may come out differently: " in finished.err
    assert "transformer_dtype was float32 and is bfloat16" in finished.err


def test_a_file_without_parameters_cannot_be_repeated(zimage: Terminal) -> None:
    Image.new("RGB", (64, 64)).save("other.png")
    finished = zimage("generate", "--from", "other.png")
    assert (finished.status, finished.err) == (2, "zimage: --from: other.png does not say how it was made\n")

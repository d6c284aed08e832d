"""`zimage generate` writes images that contain their parameters; `zimage inspect` shows them."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.unit.cli.conftest import TREE, Terminal
from zcore.errors import OutOfMemory
from zcore.image_files.writing import ImageParameters, read_parameters, write_image
from zcore.imaging.pipeline import ZImagePipeline
from zcore.request import GenerationRequest

SMALL = ("--size", "64x64", "--steps", "2")


def parameters(path: str) -> ImageParameters:
    """Return the parameters stored in an image file."""
    found = read_parameters(Path(path).read_bytes())
    assert found is not None
    return found


def test_an_image_is_written_and_its_path_seed_and_time_are_printed(zimage: Terminal) -> None:
    finished = zimage.generate("a red circle", *SMALL, "--seed", "5")
    path, seed, seconds = finished.out.rstrip("\n").split("  ")
    assert (path, seed) == ("output.png", "seed 5")
    assert float(seconds.removesuffix(" s")) >= 0
    assert [found.name for found in zimage.folder.iterdir()] == ["output.png"]
    with Image.open("output.png") as image:
        assert (image.format, image.size) == ("PNG", (64, 64))
    assert parameters("output.png").request.prompt == "a red circle"


def test_several_images_are_numbered_and_each_equals_the_single_image_of_its_seed(zimage: Terminal) -> None:
    rows = zimage.generate("a red circle", *SMALL, "--seed", "5", "--n", "2", "--output", "red.webp", "--json").out
    written = [json.loads(row) for row in rows.splitlines()]
    assert [(one["path"], one["index"], one["seed"]) for one in written] == [("red-0.webp", 0, 5), ("red-1.webp", 1, 6)]
    for one in written:
        content = Path(one["path"]).read_bytes()
        assert one["sha256"] == hashlib.sha256(content).hexdigest()
        assert (one["width"], one["height"], one["format"]) == (64, 64, "webp")
        assert parameters(one["path"]).index == one["index"]
    zimage.generate("a red circle", *SMALL, "--seed", "6", "--output", "alone.webp")
    with Image.open("red-1.webp") as second, Image.open("alone.webp") as alone:
        assert second.tobytes() == alone.tobytes()


@pytest.mark.parametrize(
    ("arguments", "path", "kind"),
    [
        (["--output", "a.JPG"], "a.JPG", "JPEG"),
        (["--output", "a.avif"], "a.avif", "AVIF"),
        (["--format", "webp"], "output.webp", "WEBP"),
        (["--output", "a.png", "--format", "jpeg"], "a.png", "JPEG"),
        (["--output", "image", "--format", "png"], "image", "PNG"),
    ],
)
def test_the_suffix_selects_the_format_unless_a_flag_does(
    arguments: list[str], path: str, kind: str, zimage: Terminal
) -> None:
    zimage.generate("a red circle", *SMALL, *arguments)
    with Image.open(path) as image:
        assert image.format == kind


def test_an_input_image_gives_its_size_and_its_digest(zimage: Terminal) -> None:
    Image.linear_gradient("L").resize((100, 80)).save("input.jpg")
    Image.new("L", (100, 80)).save("mask.png")
    zimage.generate("a circle", "--img2img", "input.jpg", "--mask", "mask.png", "--strength", "0.5", "--steps", "2")
    made = parameters("output.png")
    assert (made.request.width, made.request.height) == (96, 80)
    assert (made.request.image, made.request.mask) == ("given:input.jpg", "given:mask.png")
    assert made.inputs == {
        name: hashlib.sha256(Path(file).read_bytes()).hexdigest()
        for name, file in (("image", "input.jpg"), ("mask", "mask.png"))
    }
    zimage.generate("a circle", "--img2img", "input.jpg", *SMALL, "--output", "small.png")
    assert parameters("small.png").request.width == 64


def test_an_input_that_is_not_an_image_is_rejected(zimage: Terminal) -> None:
    Path("input.jpg").write_text("not an image")
    finished = zimage("generate", "x", "--profile", "demo", "--img2img", "input.jpg")
    assert finished.status == 2
    assert finished.err.startswith("zimage: --img2img: is not a complete image file")


def test_inspect_shows_the_parameters_in_every_format(zimage: Terminal) -> None:
    zimage.generate("a red circle", *SMALL, "--seed", "5", "--template", "art_oil")
    for suffix in ("jpg", "webp", "avif"):
        zimage.generate("--from", "output.png", "--output", f"output.{suffix}")
    paths = [f"output.{suffix}" for suffix in ("png", "jpg", "webp", "avif")]
    shown = [json.loads(row) for row in zimage("inspect", "--json", *paths).out.splitlines()]
    assert [one["file"] for one in shown] == paths
    assert [one["request"]["format"] for one in shown] == ["png", "jpeg", "webp", "avif"]
    assert {(one["request"]["seed"], one["made_by"]["model"]) for one in shown} == {(5, "checkpoint")}
    lines = [line.strip() for line in zimage("inspect", "output.avif").out.splitlines()]
    assert lines[0] == "output.avif"
    assert {"prompt: a red circle", "template: art_oil", "seed: 5", "steps: 2", "model: checkpoint"} <= set(lines)


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_inspect_shows_a_foreign_prompt_without_obeying_it(zimage: Terminal, flags: tuple[str, ...]) -> None:
    """A prompt that sets the terminal's title, forges a line and reverses what follows."""
    request = GenerationRequest(prompt="\x1b]0;OWNED\x07\n  made by\u202e\x9b31m", format="png", seed=1)
    image = write_image(Image.new("RGB", (64, 64)), request, 0, {"model\x1b[2J": "\x1b[31mdemo"})
    (zimage.folder / "foreign.png").write_bytes(image.content)
    shown = zimage("inspect", *flags, "foreign.png").out
    assert r"\u001b]0;OWNED\u0007\n  made by\u202e\u009b31m" in shown
    assert not set("\x1b\x07\x9b\u202e") & set(shown)


def test_inspect_continues_after_a_foreign_file_and_returns_status_1(zimage: Terminal) -> None:
    zimage.generate("a red circle", *SMALL)
    Image.new("RGB", (8, 8)).save("other.png")
    finished = zimage("inspect", "other.png", "output.png")
    assert finished.status == 1
    assert finished.err == "zimage: other.png: is neither an image nor an embedding written by zimage\n"
    assert finished.out.startswith("output.png\n")


def test_a_failed_write_is_status_1_and_leaves_no_file(zimage: Terminal, monkeypatch: Any) -> None:
    def full(_self: Path, _content: bytes) -> None:
        _self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    finished = zimage("generate", "x", "--profile", "demo", *SMALL)
    assert finished.status == 1
    assert finished.err == "zimage: output.png: cannot be written: No space left on device\n"
    assert list(zimage.folder.iterdir()) == []


def test_a_failure_of_the_machine_is_status_1(zimage: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: Any) -> None:
        raise OutOfMemory("64x64 does not fit the memory of cuda:0:\nout of memory")

    monkeypatch.setattr(ZImagePipeline, "generate", exhausted)
    finished = zimage("generate", "x", "--profile", "demo", *SMALL)
    assert finished.status == 1
    assert finished.err == "zimage: 64x64 does not fit the memory of cuda:0: out of memory\n"


def test_a_lora_changes_the_image_and_is_recorded_in_it(zimage: Terminal) -> None:
    night = TREE / "zcore" / "demo" / "loras" / "demo-night.safetensors"
    zimage.generate("a red circle", *SMALL, "--seed", "1", "--output", "plain.png")
    zimage.generate("a red circle", *SMALL, "--seed", "1", "--lora", f"{night}:0.8", "--output", "night.png")
    assert Path("plain.png").read_bytes() != Path("night.png").read_bytes()
    assert parameters("night.png").made_by["lora_fused:demo-night"].endswith(" at 0.8")

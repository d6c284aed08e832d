"""`zimage generate` and `zimage inspect`: pictures as files, each of which says how it was made."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.unit.cli.conftest import TREE, Terminal
from zcore.errors import OutOfMemory
from zcore.imaging.encode import PictureParameters, read_parameters
from zcore.imaging.pipeline import ZImagePipeline

SMALL = ("--size", "64x64", "--steps", "2")


def parameters(path: str) -> PictureParameters:
    """How a picture of ours was made."""
    found = read_parameters(Path(path).read_bytes())
    assert found is not None
    return found


def test_a_picture_is_written_and_its_path_seed_and_time_are_said(zimage: Terminal) -> None:
    finished = zimage.paint("a red circle", *SMALL, "--seed", "5")
    path, seed, seconds = finished.out.rstrip("\n").split("  ")
    assert (path, seed) == ("output.png", "seed 5")
    assert float(seconds.removesuffix(" s")) >= 0
    assert [found.name for found in zimage.folder.iterdir()] == ["output.png"]
    with Image.open("output.png") as image:
        assert (image.format, image.size) == ("PNG", (64, 64))
    assert parameters("output.png").request.prompt == "a red circle"


def test_several_pictures_are_numbered_and_each_is_what_its_seed_paints_alone(zimage: Terminal) -> None:
    rows = zimage.paint("a red circle", *SMALL, "--seed", "5", "--n", "2", "--output", "red.webp", "--json").out
    written = [json.loads(row) for row in rows.splitlines()]
    assert [(one["path"], one["index"], one["seed"]) for one in written] == [("red-0.webp", 0, 5), ("red-1.webp", 1, 6)]
    for one in written:
        content = Path(one["path"]).read_bytes()
        assert one["sha256"] == hashlib.sha256(content).hexdigest()
        assert (one["width"], one["height"], one["format"]) == (64, 64, "webp")
        assert parameters(one["path"]).index == one["index"]
    zimage.paint("a red circle", *SMALL, "--seed", "6", "--output", "alone.webp")
    with Image.open("red-1.webp") as second, Image.open("alone.webp") as alone:
        assert second.tobytes() == alone.tobytes()


@pytest.mark.parametrize(
    ("arguments", "path", "kind"),
    [
        (["--output", "a.JPG"], "a.JPG", "JPEG"),
        (["--output", "a.avif"], "a.avif", "AVIF"),
        (["--format", "webp"], "output.webp", "WEBP"),
        (["--output", "a.png", "--format", "jpeg"], "a.png", "JPEG"),
        (["--output", "picture", "--format", "png"], "picture", "PNG"),
    ],
)
def test_the_suffix_decides_the_format_unless_it_is_said(
    arguments: list[str], path: str, kind: str, zimage: Terminal
) -> None:
    zimage.paint("a red circle", *SMALL, *arguments)
    with Image.open(path) as image:
        assert image.format == kind


def test_a_picture_to_start_from_gives_its_size_and_its_digest(zimage: Terminal) -> None:
    Image.linear_gradient("L").resize((100, 80)).save("input.jpg")
    Image.new("L", (100, 80)).save("mask.png")
    zimage.paint("a circle", "--img2img", "input.jpg", "--mask", "mask.png", "--strength", "0.5", "--steps", "2")
    made = parameters("output.png")
    assert (made.request.width, made.request.height) == (96, 80)
    assert (made.request.image, made.request.mask) == ("given:input.jpg", "given:mask.png")
    assert made.inputs == {
        name: hashlib.sha256(Path(file).read_bytes()).hexdigest()
        for name, file in (("image", "input.jpg"), ("mask", "mask.png"))
    }
    zimage.paint("a circle", "--img2img", "input.jpg", *SMALL, "--output", "small.png")
    assert parameters("small.png").request.width == 64


def test_what_is_no_picture_cannot_be_started_from(zimage: Terminal) -> None:
    Path("input.jpg").write_text("no picture")
    finished = zimage("generate", "x", "--profile", "demo", "--img2img", "input.jpg")
    assert finished.status == 2
    assert finished.err.startswith("zimage: --img2img: is not a picture")


def test_inspect_shows_how_pictures_of_every_format_were_made(zimage: Terminal) -> None:
    zimage.paint("a red circle", *SMALL, "--seed", "5", "--template", "art_oil")
    for suffix in ("jpg", "webp", "avif"):
        zimage.paint("--from", "output.png", "--output", f"output.{suffix}")
    paths = [f"output.{suffix}" for suffix in ("png", "jpg", "webp", "avif")]
    shown = [json.loads(row) for row in zimage("inspect", "--json", *paths).out.splitlines()]
    assert [one["file"] for one in shown] == paths
    assert [one["request"]["format"] for one in shown] == ["png", "jpeg", "webp", "avif"]
    assert {(one["request"]["seed"], one["made_by"]["model"]) for one in shown} == {(5, "checkpoint")}
    lines = [line.strip() for line in zimage("inspect", "output.avif").out.splitlines()]
    assert lines[0] == "output.avif"
    assert {"prompt: a red circle", "template: art_oil", "seed: 5", "steps: 2", "model: checkpoint"} <= set(lines)


def test_inspect_goes_on_after_a_file_that_is_not_ours_and_ends_with_status_1(zimage: Terminal) -> None:
    zimage.paint("a red circle", *SMALL)
    Image.new("RGB", (8, 8)).save("other.png")
    finished = zimage("inspect", "other.png", "output.png")
    assert finished.status == 1
    assert finished.err == "zimage: other.png: is neither a picture nor an embedding of this program\n"
    assert finished.out.startswith("output.png\n")


def test_what_cannot_be_written_is_status_1_and_leaves_nothing(zimage: Terminal, monkeypatch: Any) -> None:
    def full(_self: Path, _content: bytes) -> None:
        _self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    finished = zimage("generate", "x", "--profile", "demo", *SMALL)
    assert finished.status == 1
    assert finished.err == "zimage: output.png: cannot be written: No space left on device\n"
    assert list(zimage.folder.iterdir()) == []


def test_a_failure_that_is_nobodys_mistake_is_status_1(zimage: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: Any) -> None:
        raise OutOfMemory("64x64 does not fit the memory of cuda:0:\nout of memory")

    monkeypatch.setattr(ZImagePipeline, "generate", exhausted)
    finished = zimage("generate", "x", "--profile", "demo", *SMALL)
    assert finished.status == 1
    assert finished.err == "zimage: 64x64 does not fit the memory of cuda:0: out of memory\n"


def test_a_lora_changes_the_picture_and_is_named_in_it(zimage: Terminal) -> None:
    night = TREE / "zcore" / "demo" / "loras" / "demo-night.safetensors"
    zimage.paint("a red circle", *SMALL, "--seed", "1", "--output", "plain.png")
    zimage.paint("a red circle", *SMALL, "--seed", "1", "--lora", f"{night}:0.8", "--output", "night.png")
    assert Path("plain.png").read_bytes() != Path("night.png").read_bytes()
    assert parameters("night.png").made_by["lora_fused:demo-night"].endswith(" at 0.8")

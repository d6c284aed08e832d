"""`zimage generate --from FILE` makes the same image again, bit for bit."""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save

from tests.unit.cli.conftest import TREE, Terminal
from zcore.cli import recorded_loras
from zcore.image_files.writing import read_parameters, write_image
from zcore.imaging.generation_inputs import Inputs
from zcore.imaging.pipeline import ZImagePipeline
from zcore.request import GenerationRequest, LoraUse

LORAS = TREE / "zcore" / "demo" / "loras"
SMALL = ("--size", "64x64", "--steps", "2")


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_any_of_several_images_is_repeated_bit_for_bit(suffix: str, zimage: Terminal) -> None:
    several = ("--n", "3", "--template", "art_oil", "--quality", "70", "--output", f"red.{suffix}")
    zimage.generate("a red circle", *SMALL, *several)
    for index in (0, 2):
        finished = zimage.generate("--from", f"red-{index}.{suffix}", "--output", f"again.{suffix}")
        assert finished.out.startswith(f"again.{suffix}  seed ")
        assert Path(f"again.{suffix}").read_bytes() == Path(f"red-{index}.{suffix}").read_bytes()


@pytest.mark.parametrize("suffix", ["png", "avif"])
def test_inputs_are_found_next_to_the_image_or_in_the_working_folder(suffix: str, zimage: Terminal) -> None:
    Image.linear_gradient("L").resize((100, 80)).save("input.jpg")
    Image.radial_gradient("L").resize((100, 80)).save("mask.png")
    name = f"output.{suffix}"
    zimage.generate("a circle", "--img2img", "input.jpg", "--mask", "mask.png", "--steps", "2", "--output", name)
    made = Path(name).read_bytes()
    elsewhere = zimage.folder / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(name, elsewhere)
    zimage.generate("--from", f"elsewhere/{name}", "--output", f"again.{suffix}")
    assert Path(f"again.{suffix}").read_bytes() == made
    for file in ("input.jpg", "mask.png"):
        shutil.move(file, elsewhere)
    zimage.generate("--from", f"elsewhere/{name}", "--output", f"third.{suffix}")
    assert Path(f"third.{suffix}").read_bytes() == made


def test_a_missing_or_changed_input_has_to_be_given(zimage: Terminal) -> None:
    Image.linear_gradient("L").save("input.png")
    zimage.generate("a circle", "--img2img", "input.png", *SMALL, "--seed", "1")
    shutil.copy("input.png", "moved.png")
    Image.radial_gradient("L").save("input.png")
    finished = zimage("generate", "--profile", "demo", "--from", "output.png", "--output", "again.png")
    assert finished.status == 2
    assert finished.err == (
        "zimage: --from: the image started from given:input.png; no unchanged copy of it was found; "
        "add it with --img2img\n"
    )
    assert not Path("again.png").exists()
    zimage.generate("--from", "output.png", "--img2img", "moved.png", "--output", "again.png")
    with Image.open("output.png") as first, Image.open("again.png") as again:
        assert first.tobytes() == again.tobytes()


@pytest.mark.parametrize("address", ["https://example.org/cat.png", f"input:{'0' * 64}"])
def test_an_input_from_the_service_has_to_be_given(address: str, zimage: Terminal) -> None:
    request = GenerationRequest(prompt="a circle", image=address, width=64, height=64)
    encoded = write_image(Image.new("RGB", (64, 64)), request, 0, {}, {"image": "0" * 64})
    Path("served.png").write_bytes(encoded.content)
    finished = zimage("generate", "--profile", "demo", "--from", "served.png")
    assert finished.status == 2
    assert finished.err.startswith(f"zimage: --from: the image started from {address}; no unchanged copy")


def test_flags_of_settings_override_the_parameters_of_the_image_too(zimage: Terminal) -> None:
    def made(file: str) -> GenerationRequest:
        parameters = read_parameters(Path(file).read_bytes())
        assert parameters is not None
        return parameters.request

    zimage.generate("a red circle", *SMALL)
    skipping = ("--slg", "--slg-layers", "1,2")
    zimage.generate("--from", "output.png", *skipping, "--dype", "--tiled-vae", "--output", "more.png")
    more = made("more.png")
    assert (more.slg and more.slg.layers, more.dype is not None, more.tiled_vae) == ((1, 2), True, True)
    zimage.generate("--from", "more.png", "--no-slg", "--steps", "1", "--output", "less.png")
    less = made("less.png")
    assert (less.slg, less.dype, less.tiled_vae) == (None, more.dype, True)


def test_a_different_tile_size_is_reported(zimage: Terminal) -> None:
    zimage.generate("a red circle", "--size", "160x160", "--steps", "1", "--tiled-vae", "--tile-size", "128")
    finished = zimage("generate", "--profile", "demo", "--from", "output.png", "--output", "again.png")
    assert finished.status == 0
    assert finished.err == (
        "zimage: note: the image may differ from the original: vae_tiles was 128 px, overlapping by 64 px and is None\n"
    )


def test_an_embedding_replaces_all_text_fields(zimage: Terminal) -> None:
    zimage.generate(
        "a red circle", *SMALL, "--template", "art_oil", "--guidance-scale", "2", "--negative-prompt", "blue"
    )
    assert zimage("encode", "--profile", "demo", "--output", "star.safetensors", "a green star").status == 0
    flags = ("--embeddings", "star.safetensors", "--guidance-scale", "0", "--output", "star.png")
    assert zimage("generate", "--profile", "demo", "--from", "output.png", *flags).status == 0
    made = read_parameters(Path("star.png").read_bytes())
    assert made is not None
    assert made.request.prompt.startswith("embedding ")
    assert (made.request.template, made.request.negative_prompt, made.request.steps) == (None, "", 2)


def test_flags_override_the_parameters_of_the_image(zimage: Terminal) -> None:
    zimage.generate("a red circle", "--width", "64", "--height", "80", "--steps", "2", "--seed", "7")
    zimage.generate("a blue star", "--from", "output.png", "--size", "96x64", "--n", "2", "--output", "blue.png")
    found = [read_parameters(Path(f"blue-{index}.png").read_bytes()) for index in (0, 1)]
    requests = [(one.request.prompt, one.request.width, one.request.seed, one.index) for one in found if one]
    assert requests == [("a blue star", 96, 7, 0), ("a blue star", 96, 8, 1)]
    zimage.generate("--from", "output.png", "--height", "64", "--output", "square.png")
    square = read_parameters(Path("square.png").read_bytes())
    assert square is not None
    assert (square.request.width, square.request.height, square.request.steps) == (64, 64, 2)


def test_a_different_dtype_is_reported(zimage: Terminal) -> None:
    zimage.generate("a red circle", *SMALL)
    finished = zimage(
        "generate", "--profile", "demo", "--dtype", "bfloat16", "--from", "output.png", "--output", "a.jpg"
    )
    assert finished.status == 0
    assert "the image may differ from the original: " in finished.err
    assert "transformer_dtype was float32 and is bfloat16" in finished.err


def test_a_file_without_parameters_cannot_be_repeated(zimage: Terminal) -> None:
    Image.new("RGB", (64, 64)).save("other.png")
    finished = zimage("generate", "--from", "other.png")
    assert (finished.status, finished.err) == (
        2,
        "zimage: --from: other.png contains no zimage parameters, so it cannot be repeated\n",
    )


def test_loras_that_were_fused_are_found_by_their_content(zimage: Terminal) -> None:
    night, outline = (LORAS / f"demo-{name}.safetensors" for name in ("night", "outline"))
    zimage.generate("a star", *SMALL, "--lora", f"{outline}:0.5", "--lora", f"{night}:0.8")
    made = Path("output.png").read_bytes()
    missing = zimage("generate", "--profile", "demo", "--from", "output.png", "--output", "again.png")
    assert missing.status == 2
    assert f"demo-night (SHA-256 {sha256(night)}), demo-outline (SHA-256 {sha256(outline)}); add each" in missing.err
    zimage.generate("--from", "output.png", "--set", f"lora.folder={LORAS}", "--output", "again.png")
    assert Path("again.png").read_bytes() == made
    shutil.copy(night, "a.safetensors")
    zimage.generate("--from", "output.png", "--lora", str(outline), "--output", "third.png")
    with Image.open("output.png") as first, Image.open("third.png") as third:
        assert first.tobytes() == third.tobytes()
    zimage.generate("--from", "output.png", "--lora", f"{night}:0.1", "--output", "other.png")
    other = read_parameters(Path("other.png").read_bytes())
    assert other is not None
    assert [value for name, value in other.made_by.items() if name.startswith("lora_fused:")] == [
        f"{sha256(night)} at 0.1"
    ]


def test_an_image_of_a_service_is_repeated_with_the_loras_of_its_request(zimage: Terminal) -> None:
    night = LORAS / "demo-night.safetensors"
    folder = LORAS.parent / "checkpoint"
    pipeline = ZImagePipeline.from_pretrained(folder, torch_dtype="float32", dit_device="cpu", encoder_device="cpu")
    request = GenerationRequest(
        prompt="a star", width=64, height=64, steps=2, seed=3, loras=(LoraUse(name="dark", scale=0.7),)
    )
    result = pipeline.generate(request, inputs=Inputs(loras={"dark": pipeline.load_lora(night)}))
    made = write_image(result.images[0].image, request, 0, result.made_by)
    Path("served.png").write_bytes(made.content)
    missing = zimage("generate", "--profile", "demo", "--from", "served.png")
    assert (missing.status, f"not found: dark (SHA-256 {sha256(night)}); add" in missing.err) == (2, True)
    zimage("generate", "--profile", "demo", "--from", "served.png", "--lora", str(night), "--output", "again.png")
    with Image.open("served.png") as first, Image.open("again.png") as again:
        assert first.tobytes() == again.tobytes()
    repeated = read_parameters(Path("again.png").read_bytes())
    assert repeated is not None
    assert (repeated.request.loras, repeated.made_by["lora:dark"]) == (request.loras, sha256(night))
    assert not [name for name in repeated.made_by if name.startswith("lora_fused:")]


def test_an_image_of_a_lora_that_is_not_strict_is_repeated(zimage: Terminal) -> None:
    file = zimage.folder / "partly.safetensors"
    file.write_bytes(save(load_file(LORAS / "demo-night.safetensors") | {"foreign.0.alpha": torch.ones(1)}))
    folder = LORAS.parent / "checkpoint"
    pipeline = ZImagePipeline.from_pretrained(folder, torch_dtype="float32", dit_device="cpu", encoder_device="cpu")
    request = GenerationRequest(prompt="a star", width=64, height=64, steps=2, seed=3, loras=(LoraUse(name="dark"),))
    inputs = Inputs(loras={"dark": pipeline.load_lora(file, "dark", strict=False)})
    result = pipeline.generate(request, inputs=inputs)
    Path("served.png").write_bytes(write_image(result.images[0].image, request, 0, result.made_by).content)
    again = zimage("generate", "--profile", "demo", "--from", "served.png", "--output", "again.png")
    assert again.status == 0, again.err
    assert "note: LoRA dark: left out (unsupported): foreign.0.alpha" in again.err
    with Image.open("served.png") as first, Image.open("again.png") as second:
        assert first.tobytes() == second.tobytes()
    repeated = read_parameters(Path("again.png").read_bytes())
    assert repeated is not None
    assert repeated.made_by["lora_strict:dark"] == "false"
    refused = zimage("generate", "--profile", "demo", "a star", *SMALL, "--lora", str(file))
    assert (refused.status, "has unsupported keys: foreign.0.alpha" in refused.err) == (2, True)


def test_another_text_of_the_template_is_reported(zimage: Terminal) -> None:
    templates = zimage.folder / "templates"
    templates.mkdir()
    (templates / "mine.md").write_text("Draw it in oil.", encoding="utf-8")
    zimage.generate("a star", *SMALL, "--template", "mine", "--templates-dir", "templates")
    (templates / "mine.md").write_text("Draw it in chalk.", encoding="utf-8")
    finished = zimage("generate", "--profile", "demo", "--from", "output.png", "--templates-dir", "templates")
    assert finished.status == 0
    assert "the image may differ from the original: prompt_sha256 was " in finished.err


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_record_of_a_lora_that_is_no_number_is_refused(zimage: Terminal) -> None:
    made = write_image(
        Image.new("RGB", (64, 64)),
        GenerationRequest(prompt="a", width=64, height=64),
        0,
        {"lora_fused:x": f"{'0' * 64} at much"},
    )
    Path("foreign.png").write_bytes(made.content)
    refused = zimage("generate", "--profile", "demo", "--from", "foreign.png")
    assert (refused.status, "records lora_fused:x in an unknown way" in refused.err) == (2, True)


def test_no_file_is_read_after_all_loras_are_found(tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.safetensors" for name in ("other", "night", "checkpoint")}
    for name, path in files.items():
        path.write_text(name)
    remaining = iter(files.values())
    wanted = sha256(files["night"])
    assert recorded_loras._files_of({wanted}, remaining) == {wanted: files["night"]}
    assert recorded_loras._files_of(set(), remaining) == {}

"""`zimage doctor` tells what fits, and why, without a weight, a download or a card."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.unit.cli.conftest import TREE, Terminal

GIB = 1024**3
CARDS = {"rtx4090": "24", "rtx4080": "16", "rtx3060": "12", "rtx3060ti": "8"}


@pytest.fixture
def doctor(zimage: Terminal, layout_dir: Path) -> Any:
    """Asks about the real architecture, beside 64 GiB of the CPU's memory; gives the status and what is told."""

    def ask(*arguments: str) -> tuple[int, dict[str, Any]]:
        ended = zimage("doctor", "--model-path", str(layout_dir), "--ram", "64", *arguments, "--json")
        assert ended.err == ""
        return ended.status, json.loads(ended.out)

    return ask


@pytest.mark.parametrize("profile", CARDS)
def test_each_cards_profile_fits_its_card(doctor: Any, profile: str) -> None:
    status, told = doctor("--profile", profile, "--vram", CARDS[profile], "--size", "1024x1024")
    assert (status, told["fits"]) == (0, True)
    assert told["largest_square_px"] >= 1024


def test_bfloat16_without_offload_does_not_fit_16_gb_and_the_report_says_why(doctor: Any) -> None:
    status, told = doctor("--profile", "rtx4090", "--vram", "16")
    assert (status, told["fits"], told["largest_square_px"]) == (1, False, None)
    (card,) = told["estimate"]["devices"]
    assert card["missing_bytes"] == card["peak_bytes"] - 16 * GIB > 0
    assert re.fullmatch(r"cuda needs [\d.]+ GiB of 16.00 GiB to decode, [\d.]+ GiB too much", told["why"])


def test_12_gb_do_not_hold_the_transformer_in_bfloat16(doctor: Any) -> None:
    assert doctor("--profile", "rtx3060", "--vram", "12", "--dit-quantization", "none")[0] == 1


def test_profiles_that_use_the_card_are_listed_the_one_that_takes_the_most_first(doctor: Any) -> None:
    told = doctor("--profile", "rtx4080", "--vram", "12")[1]["profiles"]
    assert {one["name"] for one in told} == {"default", "production", *CARDS}
    peaks = [one["peak_bytes"] for one in told]
    assert peaks == sorted(peaks, reverse=True)
    assert {one["name"] for one in told if one["fault"] is None} == {"rtx3060", "rtx3060ti"}


def test_a_profile_counts_with_its_own_settings_whatever_is_asked_about(doctor: Any) -> None:
    (one, other) = (
        {one["name"]: one["peak_bytes"] for one in doctor("--profile", profile, "--vram", "24")[1]["profiles"]}
        for profile in ("rtx3060ti", "rtx4090")
    )
    assert one == other


def test_larger_pictures_guidance_and_longer_prompts_take_more(doctor: Any) -> None:
    def working(*arguments: str) -> int:
        (card,) = doctor("--profile", "rtx4090", "--vram", "80", *arguments)[1]["estimate"]["devices"]
        return next(phase["working_bytes"] for phase in card["phases"] if phase["phase"] == "denoise")

    plain = working()
    assert working("--size", "2048x2048") > 3 * plain
    assert working("--guidance-scale", "2") > plain
    assert working("--prompt-tokens", "1504") > plain
    assert working("--set", "pytorch.batch_size=2") > 1.9 * plain


def test_too_little_memory_of_the_cpu_is_a_reason_too(doctor: Any) -> None:
    status, told = doctor("--profile", "rtx4080", "--vram", "16", "--ram", "4")
    assert status == 1
    assert told["why"].startswith("cpu needs ")


def test_without_a_card_it_speaks_of_the_cpus_memory(zimage: Terminal) -> None:
    ended = zimage("doctor", "--profile", "demo")
    assert (ended.status, ended.err) == (0, "")
    assert re.search(r"^128x128: fits: cpu needs [\d.]+ GiB of [\d.]+ GiB", ended.out, re.MULTILINE)
    assert "checkpoint: zcore/demo/checkpoint\n" in ended.out
    assert "not measured" in ended.out
    assert "NOT WHOLE" not in ended.out


def test_a_report_in_words_has_every_part(zimage: Terminal, layout_dir: Path) -> None:
    out = zimage("doctor", "--model-path", str(layout_dir), "--vram", "12", "--ram", "64", "--profile", "rtx3060").out
    for line in (
        r"cuda +12\.00 GiB  pretended",
        r"attention: .*sdpa.*",
        r"transformer +cuda +cuda +8bit, bfloat16 +5\.87 GiB",
        r"peak +[\d.]+ GiB of 12\.00 GiB",
        r"1024x1024: fits: cuda needs .*",
        r"largest square picture: \d+x\d+",
        r"rtx4080 .* too much",
        r"rtx3060ti .* fits",
    ):
        assert re.search(rf"^{line}$", out, re.MULTILINE), line


def test_weights_that_are_not_there_are_told_and_change_nothing_of_the_estimate(doctor: Any) -> None:
    status, told = doctor("--profile", "rtx4090", "--vram", "24")
    (fault,) = [one["fault"] for one in told["checked"] if one["name"] == "checkpoint"]
    assert status == 0
    assert fault.endswith("is not there")


def test_a_weight_file_that_was_cut_off_is_told(zimage: Terminal, tmp_path: Path) -> None:
    folder = copy_of_the_demo(tmp_path)
    whole = zimage("doctor", "--profile", "demo", "--model-path", str(folder))
    assert "NOT WHOLE" not in whole.out
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    cut = zimage("doctor", "--profile", "demo", "--model-path", str(folder))
    assert f"NOT WHOLE: {path} has {path.stat().st_size} bytes; its header says {path.stat().st_size + 1}" in cut.out
    path.write_bytes(b"nothing of the kind")
    assert "is not a safetensors file" in zimage("doctor", "--profile", "demo", "--model-path", str(folder)).out


def copy_of_the_demo(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    for path in (TREE / "zcore" / "demo" / "checkpoint").rglob("*"):
        if path.is_file():
            place = folder / path.relative_to(TREE / "zcore" / "demo" / "checkpoint")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model-path", "some/body"), "is neither a folder nor in the hub's cache, and nothing is downloaded"),
        (("--profile", "demo", "--vram", "much"), "--vram: must be GiB above 0"),
        (("--profile", "demo", "--prompt-tokens", "1505"), "--prompt-tokens: 1505; this checkpoint places at most"),
        (("--profile", "demo", "--size", "1000x1000"), "--width: "),
        (("--profile", "demo", "--vram", "24", "--dit-device", "cuda:1"), "cuda:1 was asked for, and one card is"),
    ],
)
def test_what_cannot_be_told_is_one_line_and_status_2(
    zimage: Terminal, arguments: tuple[str, ...], message: str
) -> None:
    ended = zimage("doctor", *arguments)
    assert (ended.status, ended.out) == (2, "")
    assert message in ended.err
    assert ended.err.count("\n") == 1


def test_a_packed_file_that_is_not_there_is_said_among_what_was_checked(doctor: Any, tmp_path: Path) -> None:
    status, told = doctor("--vram", "80", "--dit-weights", str(tmp_path / "gone.gguf"))
    assert status == 0
    faults = {one["name"]: one["fault"] for one in told["checked"]}
    assert faults["transformer, single file"] == "No such file or directory"


def test_only_a_missing_card_is_answered_with_a_pretended_one(zimage: Terminal, layout_dir: Path) -> None:
    ask = ("doctor", "--model-path", str(layout_dir))
    assert zimage(*ask, "--dit-device", "cuda").err.rstrip().endswith("--vram 24 pretends a card")
    refused = zimage(*ask, "--dit-device", "cpu", "--encoder-device", "cpu", "--dtype", "float16")
    assert "float16" in refused.err
    assert "pretends" not in refused.err


def test_a_profile_that_cannot_be_loaded_does_not_end_the_report(doctor: Any, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("[default]\n[bad.pytorch]\ntile_size = 128\ntile_overlap = 96\n")
    status, told = doctor("--config", str(config), "--vram", "80")
    assert status == 0
    faults = {one["name"]: one["fault"] for one in told["profiles"]}
    assert "96 px is more than half of tile_size" in faults["bad"]
    assert faults["default"] is None

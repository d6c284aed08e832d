"""`zimage doctor` reports what fits, and why, without weights, downloads or a GPU."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.unit.cli.conftest import TREE, Terminal

GIB = 1024**3
GPUS = {"rtx4090": "24", "rtx4080": "16", "rtx3060": "12", "rtx3060ti": "8"}


@pytest.fixture
def doctor(zimage: Terminal, layout_dir: Path) -> Any:
    """Return a function that asks about the real architecture with 64 GiB of main memory: status and JSON report."""

    def ask(*arguments: str) -> tuple[int, dict[str, Any]]:
        ended = zimage("doctor", "--model-path", str(layout_dir), "--ram", "64", *arguments, "--json")
        assert ended.err == ""
        return ended.status, json.loads(ended.out)

    return ask


@pytest.mark.parametrize("profile", GPUS)
def test_the_profile_of_each_gpu_fits_that_gpu(doctor: Any, profile: str) -> None:
    status, report = doctor("--profile", profile, "--vram", GPUS[profile], "--size", "1024x1024")
    assert (status, report["fits"]) == (0, True)
    assert report["largest_square_px"] >= 1024


def test_bfloat16_without_offload_does_not_fit_16_gb_and_the_report_says_why(doctor: Any) -> None:
    status, report = doctor("--profile", "rtx4090", "--vram", "16")
    assert (status, report["fits"], report["largest_square_px"]) == (1, False, None)
    (gpu,) = report["estimate"]["devices"]
    assert gpu["missing_bytes"] == gpu["peak_bytes"] - 16 * GIB > 0
    assert re.fullmatch(r"cuda needs [\d.]+ GiB of 16.00 GiB to decode, [\d.]+ GiB too much", report["reason"])


def test_12_gb_do_not_hold_the_transformer_in_bfloat16(doctor: Any) -> None:
    assert doctor("--profile", "rtx3060", "--vram", "12", "--dit-quantization", "none")[0] == 1


def test_profiles_that_use_the_gpu_are_listed_largest_first(doctor: Any) -> None:
    profiles = doctor("--profile", "rtx4080", "--vram", "12")[1]["profiles"]
    assert {one["name"] for one in profiles} == {"default", "production", *GPUS}
    peaks = [one["peak_bytes"] for one in profiles]
    assert peaks == sorted(peaks, reverse=True)
    assert {one["name"] for one in profiles if one["problem"] is None} == {"rtx3060", "rtx3060ti"}


def test_each_profile_is_estimated_with_its_own_settings(doctor: Any) -> None:
    (one, other) = (
        {one["name"]: one["peak_bytes"] for one in doctor("--profile", profile, "--vram", "24")[1]["profiles"]}
        for profile in ("rtx3060ti", "rtx4090")
    )
    assert one == other


def test_larger_images_guidance_and_longer_prompts_need_more_memory(doctor: Any) -> None:
    def working(*arguments: str) -> int:
        (gpu,) = doctor("--profile", "rtx4090", "--vram", "80", *arguments)[1]["estimate"]["devices"]
        return next(phase["working_bytes"] for phase in gpu["phases"] if phase["phase"] == "denoise")

    plain = working()
    assert working("--size", "2048x2048") > 3 * plain
    assert working("--guidance-scale", "2") > plain
    assert working("--prompt-tokens", "1504") > plain
    assert working("--set", "pytorch.batch_size=2") > 1.9 * plain


def test_too_little_main_memory_is_a_reason_too(doctor: Any) -> None:
    status, report = doctor("--profile", "rtx4080", "--vram", "16", "--ram", "4")
    assert status == 1
    assert report["reason"].startswith("cpu needs ")


def test_without_a_gpu_the_report_is_about_main_memory(zimage: Terminal) -> None:
    ended = zimage("doctor", "--profile", "demo")
    assert (ended.status, ended.err) == (0, "")
    assert re.search(r"^128x128: fits: cpu needs [\d.]+ GiB of [\d.]+ GiB", ended.out, re.MULTILINE)
    assert "checkpoint: zcore/demo/checkpoint\n" in ended.out
    assert "not measured" in ended.out
    assert "PROBLEM" not in ended.out


def test_the_text_report_has_every_part(zimage: Terminal, layout_dir: Path) -> None:
    out = zimage("doctor", "--model-path", str(layout_dir), "--vram", "12", "--ram", "64", "--profile", "rtx3060").out
    for line in (
        r"cuda +12\.00 GiB  assumed",
        r"  sdpa: available",
        r"transformer +cuda +cuda +8bit, bfloat16 +5\.87 GiB",
        r"peak +[\d.]+ GiB of 12\.00 GiB",
        r"1024x1024: fits: cuda needs .*",
        r"largest square image: \d+x\d+",
        r"rtx4080 .* too much",
        r"rtx3060ti .* fits",
    ):
        assert re.search(rf"^{line}$", out, re.MULTILINE), line


def test_missing_weights_are_reported_and_do_not_change_the_estimate(doctor: Any) -> None:
    status, report = doctor("--profile", "rtx4090", "--vram", "24")
    (problem,) = [one["problem"] for one in report["checks"] if one["name"] == "checkpoint"]
    assert status == 0
    assert problem.endswith("is missing")


def test_a_truncated_weight_file_is_reported(zimage: Terminal, tmp_path: Path) -> None:
    folder = copy_of_the_demo(tmp_path)
    intact = zimage("doctor", "--profile", "demo", "--model-path", str(folder))
    assert "PROBLEM" not in intact.out
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    cut = zimage("doctor", "--profile", "demo", "--model-path", str(folder))
    size = path.stat().st_size
    assert f"PROBLEM: {path} has {size} bytes; its header specifies {size + 1}" in cut.out
    path.write_bytes(b"nothing of the kind")
    assert "is not a safetensors file" in zimage("doctor", "--profile", "demo", "--model-path", str(folder)).out


def copy_of_the_demo(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    for path in (TREE / "zcore" / "demo" / "checkpoint").rglob("*"):
        if path.is_file():
            target = folder / path.relative_to(TREE / "zcore" / "demo" / "checkpoint")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--model-path", "some/body"),
            "is neither a folder nor in the Hugging Face cache, and",
        ),
        (("--profile", "demo", "--vram", "much"), "--vram: must be a number of GiB above 0, not `much`"),
        (
            ("--profile", "demo", "--prompt-tokens", "1505"),
            "must be a whole number from 1 to 1504 for this",
        ),
        (("--profile", "demo", "--size", "1000x1000"), "--size: "),
        (("--profile", "demo", "--size", "2048x2048"), "must result in at most 262144 pixels"),
        (
            ("--profile", "demo", "--vram", "24", "--dit-device", "cuda:1"),
            "device: cuda:1 does not exist: --vram",
        ),
    ],
)
def test_an_impossible_check_is_one_line_and_status_2(
    zimage: Terminal, arguments: tuple[str, ...], message: str
) -> None:
    ended = zimage("doctor", *arguments)
    assert (ended.status, ended.out) == (2, "")
    assert message in ended.err
    assert ended.err.count("\n") == 1


def test_a_missing_gguf_file_is_reported_among_the_checks(doctor: Any, tmp_path: Path) -> None:
    status, report = doctor("--vram", "80", "--dit-weights", str(tmp_path / "gone.gguf"))
    assert status == 0
    problems = {one["name"]: one["problem"] for one in report["checks"]}
    assert problems["transformer, single file"] == "No such file or directory"


def test_only_for_a_missing_gpu_is_vram_suggested(zimage: Terminal, layout_dir: Path) -> None:
    ask = ("doctor", "--model-path", str(layout_dir))
    assert zimage(*ask, "--dit-device", "cuda").err.rstrip().endswith("add --vram 24 to assume a 24 GiB GPU")
    refused = zimage(*ask, "--dit-device", "cpu", "--encoder-device", "cpu", "--dtype", "float16")
    assert "float16" in refused.err
    assert "--vram" not in refused.err


def test_an_invalid_profile_does_not_end_the_report(doctor: Any, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("[default]\n[bad.pytorch]\ntile_size = 128\ntile_overlap = 96\n")
    status, report = doctor("--config", str(config), "--vram", "80")
    assert status == 0
    problems = {one["name"]: one["problem"] for one in report["profiles"]}
    assert "96 px is more than half of tile_size" in problems["bad"]
    assert problems["default"] is None


def test_the_largest_square_is_one_that_generate_accepts(zimage: Terminal) -> None:
    report = json.loads(zimage("doctor", "--profile", "demo", "--json").out)
    assert report["largest_square_px"] == 512
    assert zimage("generate", "x", "--profile", "demo", "--size", "528x528").status == 2

"""`zimage benchmark attention` compares each backend with sdpa, in time and in pixels."""

import json
import math
import re
from collections.abc import Sequence

import pytest
from PIL import Image

from tests.unit.cli.conftest import Terminal
from zcore.cli import variations
from zcore.cli.variations import Outcome, Subject, Variation
from zcore.imaging.profiler import Measurement, PeakMemory, Spread

SMALL = ("benchmark", "attention", "--profile", "demo", "--size", "64x64", "--steps", "1", "--runs", "1")


def outcome(backend: str, gray: int | None) -> Outcome:
    """Return an outcome with an image of one color, or without one."""
    variation = Variation(backend, False, "none")
    if gray is None:
        return Outcome(variation, problem="broken")
    found = Measurement(
        {}, 1, 1.0, dict.fromkeys(("generate", "step"), Spread(2000, 1000, 3000)), PeakMemory(1, "cuda")
    )
    return Outcome(variation, found, Image.new("RGB", (16, 16), (gray, gray, gray)))


def test_each_backend_is_compared_with_sdpa(zimage: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = [outcome("sdpa", 100), outcome("sage", 150), outcome("xformers", None)]
    monkeypatch.setattr(variations, "measure_each", lambda *_arguments: outcomes)
    report = json.loads(zimage(*SMALL, "--json").out)
    sdpa, sage, xformers = (row["similarity"] for row in report["backends"])
    assert sdpa == {"ssim": pytest.approx(1), "psnr_db": None}
    c1 = (0.01 * 255) ** 2
    assert sage["ssim"] == pytest.approx((2 * 100 * 150 + c1) / (100**2 + 150**2 + c1))
    assert sage["psnr_db"] == pytest.approx(20 * math.log10(255 / 50))
    assert xformers is None
    text = zimage(*SMALL).out
    for line in (
        r"sdpa +2\.000 s +1\.000 to 3\.000 s +2\.000 s +1\.0000 +inf",
        r"sage +2\.000 s +1\.000 to 3\.000 s +2\.000 s +0\.9231 +14\.15 dB",
        r"xformers +failed: broken",
    ):
        assert re.search(rf"^{line}$", text, re.MULTILINE), line


def test_without_a_reference_nothing_is_compared(zimage: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = [outcome("sdpa", None), outcome("sage", 150)]
    monkeypatch.setattr(variations, "measure_each", lambda *_arguments: outcomes)
    ended = zimage(*SMALL)
    assert ended.status == 1
    assert re.search(r"^sage .* s +- +-$", ended.out, re.MULTILINE)


def test_the_configuration_is_measured_with_every_backend_that_can_run(
    zimage: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Variation] = []

    def record(_subject: Subject, chosen: Sequence[Variation], _on_begin: object) -> list[Outcome]:
        asked.extend(chosen)
        return [outcome(one.attention_backend, 1) for one in chosen]

    monkeypatch.setattr(variations, "measure_each", record)
    ended = zimage(*SMALL, "--compile", "--dit-quantization", "8bit")
    assert (ended.status, ended.err) == (0, "")
    assert asked == [Variation("sdpa", True, "8bit")]  # no other backend runs on a CPU
    assert re.search(r"^flash_attn_2: not available: needs .*$", ended.out, re.MULTILINE)


def test_a_backend_cannot_be_chosen(zimage: Terminal) -> None:
    ended = zimage(*SMALL, "--attention-backend", "sdpa")
    assert ended.status == 2
    assert ended.err == "zimage: --attention-backend: has no effect here, since every backend is measured\n"

"""`zimage profile` measures what it says it measures, and a failing variation is a row of its table."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
from PIL import Image

from tests.unit.cli.conftest import Terminal
from zcore.checkpoint.defaults import generation_defaults
from zcore.cli import variations
from zcore.cli.variations import DIED, Outcome, Subject, Variation, all_variations
from zcore.imaging import profiler
from zcore.imaging.pipeline import ZImagePipeline
from zcore.imaging.profiler import Measurement, PeakMemory, Spread
from zcore.imaging.weights.quantization import is_packed
from zcore.request import parse_generation
from zcore.settings import load_settings

SMALL = ("--profile", "demo", "--size", "64x64", "--steps", "1", "--runs", "1")
PLAIN = Variation("sdpa", False, "none")


@pytest.fixture
def subject() -> Subject:
    """The demo checkpoint with a tiny image."""
    settings = load_settings({}, {"profile": "demo"})
    request = parse_generation(
        {"prompt": "x", "width": 64, "height": 64, "steps": 1, "seed": 1}, generation_defaults(settings)
    )
    return Subject.of(settings, request, runs=1)


def measurement(total_ms: float) -> Measurement:
    phases = ("encode", "denoise", "decode", "generate", "total", "step")
    spread = Spread(total_ms, total_ms - 1, total_ms + 1)
    return Measurement({}, 1, 9.0, dict.fromkeys(phases, spread), PeakMemory(2**30, "process"))


def test_the_machine_and_the_settings_are_shown_without_a_model(zimage: Terminal) -> None:
    ended = zimage("profile", "--show-info", "--model-path", "no/such", "--compile")
    assert (ended.status, ended.err) == (0, "")
    for line in (
        r"cpu +[\d.]+ GiB .*",
        r"  sdpa: available",
        r"  flash_attn_2: not available: needs .*",
        r'model_path = "no/such" +# flag',
        r"pytorch.compile = true +# flag",
    ):
        assert re.search(rf"^{line}$", ended.out, re.MULTILINE), line


def test_the_tests_print_every_phase_and_what_was_loaded(zimage: Terminal) -> None:
    ended = zimage("profile", *SMALL, "--show-info", "--tests", "encode,generate", "--dit-quantization", "8bit")
    assert (ended.status, ended.err) == (0, "")
    number = r" +\d+\.\d{3}"
    for line in (
        r"  sdpa: available",
        r"transformer_quantization +8bit",
        r"64x64, 1 steps; 1 measured run after 1 to warm up, which took [\d.]+ s",
        *(rf"{name}{number * 3}" for name in ("encode", "denoise", "decode", "step")),
        rf"generate: denoise and decode{number * 3}",
        rf"total: encode and generate{number * 3}",
        r"peak memory +[\d.]+ GiB, resident memory of the process, loading included",
    ):
        assert re.search(rf"^{line}$", ended.out, re.MULTILINE), line


def test_encoding_alone_loads_the_text_encoder_alone(zimage: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> NoReturn:
        raise AssertionError("the transformer was loaded")

    monkeypatch.setattr(ZImagePipeline, "load", refuse)
    report = json.loads(zimage("profile", *SMALL, "--tests", "encode", "--json").out)
    assert report["measurement"]["milliseconds"].keys() == {"encode"}
    assert report["request"]["steps"] == 1


def test_the_cache_does_not_hide_the_cost_of_encoding(subject: Subject) -> None:
    assert load_settings({}, {"profile": "demo"}).pytorch.embedding_cache
    assert subject.options.encoder.embedding_cache_bytes == 0


def test_a_sweep_is_every_combination_that_can_run_and_flags_fix_what_they_name(subject: Subject) -> None:
    everything = all_variations(subject.options, None, None, None)
    assert len(everything) == len(set(everything)) == 1 * 2 * 4  # no backend but sdpa runs on a CPU
    assert {one.quantization for one in everything} == {"none", "8bit", "fp8", "4bit"}
    assert all_variations(subject.options, "flash_attn_2", False, "8bit") == [Variation("flash_attn_2", False, "8bit")]
    assert all_variations(subject.options, "auto", True, "none") == [Variation("sdpa", True, "none")]


def test_what_is_measured_is_the_variation(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read the weights of the pipeline that is measured, not what it says about them."""
    measured: list[ZImagePipeline] = []

    def record(pipeline: ZImagePipeline, *_arguments: object) -> tuple[Measurement, None]:
        measured.append(pipeline)
        return measurement(1), None

    monkeypatch.setattr(variations, "measure_generation", record)
    for quantization in ("none", "8bit"):
        assert variations._attempt(subject, Variation("sdpa", True, quantization)).problem is None
    packed = [is_packed(pipeline._engine._model._weights) for pipeline in measured]
    assert packed == [False, True]
    assert [pipeline.describe()["compiled"] for pipeline in measured] == ["default", "default"]


def test_a_model_that_was_not_loaded_as_asked_is_no_measurement(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ZImagePipeline.load(subject.model_path, subject.options)
    monkeypatch.setattr(ZImagePipeline, "load", lambda *_arguments: plain)
    outcome = variations._attempt(subject, Variation("sdpa", False, "8bit"))
    assert outcome.measurement is None
    assert outcome.problem == (
        "was loaded with attention, compilation and quantization ('sdpa', False, 'none') instead"
    )


def test_each_variation_is_measured_in_a_process_of_its_own_and_a_failing_one_is_a_row(
    zimage: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [Variation("flash_attn_2", False, "none"), PLAIN]
    monkeypatch.setattr(variations, "all_variations", lambda *_arguments: chosen)
    monkeypatch.setattr(profiler, "measure_generation", None)  # nothing is measured in this process
    ended = zimage("profile", *SMALL, "--sweep")
    assert (ended.status, ended.err) == (0, "")
    number = r" +\d+\.\d{3} s"
    for line in (
        r"flash_attn_2  no            none            failed: attention_backend: flash_attn_2 needs .*",
        rf"sdpa          no            none   {number * 4} +[\d.]+ to [\d.]+ s +[\d.]+ GiB",
        r"flash_attn_3: not available: needs .*",
        r"\[demo\.pytorch\]\nattention_backend = \"sdpa\"\ncompile = false",
        r"\[demo\.pipeline\]\nquantization = \"none\"",
    ):
        assert re.search(rf"^{line}$", ended.out, re.MULTILINE), line


class Deadly:
    """Ends the process that unpickles it, as the system does when memory runs out."""

    def __reduce__(self) -> tuple[Any, tuple[int]]:
        return os._exit, (9,)


def test_a_process_that_dies_is_a_row_too() -> None:
    deadly: Any = Deadly()
    assert variations._in_new_process(deadly, PLAIN) == Outcome(PLAIN, problem=DIED)


def fake_outcomes(*totals_ms: float | None) -> Sequence[Outcome]:
    backends = ("sdpa", "sage", "xformers")
    return [
        Outcome(Variation(name, True, "8bit"), problem="broken")
        if total is None
        else Outcome(Variation(name, True, "8bit"), measurement(total), Image.new("RGB", (1, 1)))
        for name, total in zip(backends, totals_ms, strict=False)
    ]


def test_the_fastest_is_named_with_the_settings_to_copy(zimage: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variations, "measure_each", lambda *_arguments: fake_outcomes(30, 20, None))
    report = json.loads(zimage("profile", *SMALL, "--sweep", "--json").out)
    assert report["fastest"] == {"attention_backend": "sage", "compile": True, "quantization": "8bit"}
    assert [row["problem"] for row in report["sweep"]] == [None, None, "broken"]
    assert report["sweep"][0]["measurement"]["milliseconds"]["total"]["median"] == 30
    lines = zimage("profile", *SMALL, "--sweep").out
    assert 'attention_backend = "sage"\ncompile = true\n' in lines


def test_the_lines_to_copy_are_settings_that_select_the_variation(
    zimage: Terminal, settings_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(variations, "measure_each", lambda *_arguments: fake_outcomes(30, 20))
    lines = zimage("profile", *SMALL, "--sweep").out.partition("config.toml:\n")[2]
    settings = load_settings({}, {"profile": "demo"}, Path(settings_file(lines)))
    assert settings.pytorch.attention_backend == "sage"
    assert settings.pytorch.compile
    assert settings.pipeline.quantization == "8bit"


def test_a_sweep_without_any_success_fails(zimage: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variations, "measure_each", lambda *_arguments: fake_outcomes(None, None))
    assert zimage("profile", *SMALL, "--sweep").status == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tests", "encode,speed"), "--tests: must be encode, generate, or encode,generate, not `speed`"),
        (("--sweep", "--tests", "encode"), "--tests: must contain generate with --sweep"),
        (("--runs", "0"), "--runs: must be a whole number from 1 to 1000, not `0`"),
        (("--width", "65"), "--width: must be"),
        (("--attention-backend", "flash_attn_2"), "attention_backend: flash_attn_2 needs"),
    ],
)
def test_a_mistake_is_one_line(zimage: Terminal, arguments: tuple[str, ...], message: str) -> None:
    ended = zimage("profile", "--profile", "demo", *arguments)
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.startswith(f"zimage: {message}")
    assert ended.err.count("\n") == 1

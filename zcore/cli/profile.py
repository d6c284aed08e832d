"""`zimage profile`: what this machine offers, what an image costs on it, and which configuration is the fastest.

Prints tables or JSON. `zcore.imaging.profiler` measures, `zcore.cli.variations` varies.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from zcore.cli.config import setting_lines
from zcore.cli.diagnosis import gib, machine_lines
from zcore.cli.measured_request import add_measuring_flags, measured_request
from zcore.cli.model_files import check_model_files
from zcore.cli.parser import Commands
from zcore.cli.progress import ProgressLine
from zcore.cli.setting_flags import ChosenSettings, chosen_settings, value_of
from zcore.errors import ConfigurationError
from zcore.foreign_text import printable
from zcore.request import GenerationRequest
from zcore.settings import setting_names

if TYPE_CHECKING:
    from zcore.cli.variations import Outcome, Variation
    from zcore.imaging.profiler import Measurement, PeakMemory

TESTS = ("encode", "generate")
SHOWN_SECTIONS = ("model_path", "encoder", "pipeline", "generation", "pytorch")
"""Settings, and sections of settings, that decide what an image costs."""

LABELS = {"generate": "generate: denoise and decode", "total": "total: encode and generate"}

DESCRIPTION = """\
Measure what an image costs on this machine, and find the fastest configuration.

  zimage profile --show-info                  devices, attention backends, settings; loads no model
  zimage profile --tests encode,generate      time of each phase, seconds per step, peak memory
  zimage profile --attention-backend flash_attn_2 --tests generate
  zimage profile --sweep                      every attention backend x compile x quantization that can run
  zimage profile --sweep --no-compile         flags fix what they name

Without a PROMPT, a prompt and a seed of its own are used."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the output, for programs and as lines for people."""

    report: dict[str, Any]
    lines: Sequence[str]
    status: int = 0


def add_to(commands: Commands) -> None:
    """Add the command and its flags."""
    parser = commands.add_parser(
        "profile",
        usage="zimage profile [FLAGS] [PROMPT]",
        help="measure the speed and memory of configurations",
        description=DESCRIPTION,
    )
    parser.add_argument(
        "--show-info",
        action="store_true",
        help="Show devices, attention backends with the reason for each absence, and settings.",
    )
    parser.add_argument(
        "--tests",
        metavar="NAMES",
        type=_tests,
        help="What to measure: encode, generate, or both separated by a comma. (default encode,generate)",
    )
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="Measure every combination of attention backend, compilation and quantization, each in a new process.",
    )
    add_measuring_flags(parser)
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Print what was asked for; the status is 1 if every variation of a sweep failed. Raises `ZImageError`."""
    chosen = chosen_settings(arguments)
    tests: Sequence[str] = arguments.tests or TESTS
    if arguments.sweep and "generate" not in tests:
        raise ConfigurationError("--tests: must contain generate with --sweep, which varies the transformer")
    measures = arguments.sweep or arguments.tests or not arguments.show_info
    parts: list[Callable[[], Part]] = [partial(_info, chosen)] if arguments.show_info else []
    if measures:
        request = measured_request(arguments, chosen.settings)
        components = ("text_encoder", "transformer", "vae") if "generate" in tests else ("text_encoder",)
        check_model_files(arguments, chosen.settings, components)
        parts.append(partial(_sweep if arguments.sweep else _measurement, arguments, chosen, request, tests))
    report: dict[str, Any] = {}
    status = 0
    for make in parts:
        part = make()
        report |= part.report
        status = max(status, part.status)
        if not arguments.json:
            print("\n".join(map(printable, part.lines)), flush=True)
    if arguments.json:
        print(printable(json.dumps(report, ensure_ascii=False)))
    return status


def _info(chosen: ChosenSettings) -> Part:
    from zcore.cli.machine import inspect_machine  # loads torch

    machine = inspect_machine()
    names = [name for name in setting_names() if name.partition(".")[0] in SHOWN_SECTIONS]
    return Part(
        {"machine": asdict(machine), "settings": {name: value_of(chosen.settings, name) for name in names}},
        [*machine_lines(machine), "", *setting_lines(chosen, names), ""],
    )


def _measurement(
    arguments: argparse.Namespace, chosen: ChosenSettings, request: GenerationRequest, tests: Sequence[str]
) -> Part:
    with ProgressLine(sys.stderr, images=1) as line:
        line.show("loading the model ...")
        from zcore.cli.variations import Subject, measure  # loads torch

        measurement = measure(
            Subject.of(chosen.settings, request, arguments.runs),
            tests,
            lambda number: line.show(f"run {number} of {arguments.runs} ..." if number else "warming up ..."),
        )
    lines = [
        *(f"{name:30}{value:>10}" for name, value in measurement.applied.items()),
        "",
        f"{conditions(request, arguments.runs)}, which took {seconds(measurement.warm_up_ms)}",
        "",
        f"{'seconds':30}{'median':>10}{'min':>10}{'max':>10}",
        *_phase_lines(measurement, tests),
        f"{'peak memory':30}{gib(measurement.peak_memory.size_bytes):>10}, {described_memory(measurement.peak_memory)}",
        *(f"note: {fallback}" for fallback in measurement.fallbacks),
    ]
    return Part({"request": request_summary(request), "measurement": asdict(measurement)}, lines)


def _sweep(
    arguments: argparse.Namespace, chosen: ChosenSettings, request: GenerationRequest, tests: Sequence[str]
) -> Part:
    given = vars(arguments)
    with ProgressLine(sys.stderr, images=1) as line:
        line.show("looking for what can run ...")
        from zcore.cli.variations import Subject, all_variations, backend_problems, measure_each  # loads torch

        subject = Subject.of(chosen.settings, request, arguments.runs)
        variations = all_variations(
            subject.options,
            given.get("pytorch.attention_backend"),
            given.get("pytorch.compile"),
            given.get("pipeline.quantization"),
        )
        numbers = {variation: number for number, variation in enumerate(variations, 1)}
        outcomes = measure_each(
            subject,
            variations,
            lambda one: line.show(f"{numbers[one]} of {len(variations)}: {', '.join(_cells(one))} ..."),
        )
        problems = backend_problems(subject.options)
    fastest = _fastest(outcomes, tests)
    report = {
        "request": request_summary(request),
        "sweep": [outcome_summary(outcome) for outcome in outcomes],
        "unavailable": problems,
        "fastest": asdict(fastest.variation) if fastest else None,
    }
    lines = [
        conditions(request, arguments.runs),
        "",
        *_sweep_lines(outcomes, tests),
        *unavailable_lines(problems),
        *(_settings_to_copy(chosen, fastest.variation) if fastest else ()),
    ]
    return Part(report, lines, 0 if fastest else 1)


def request_summary(request: GenerationRequest) -> dict[str, Any]:
    """Return what of the request decides the cost of its image."""
    return {name: getattr(request, name) for name in ("prompt", "width", "height", "steps", "seed", "guidance_scale")}


def outcome_summary(outcome: "Outcome") -> dict[str, Any]:
    """Return an outcome for programs, without its image."""
    measurement = outcome.measurement
    return {
        **asdict(outcome.variation),
        "measurement": asdict(measurement) if measurement else None,
        "problem": outcome.problem,
    }


def conditions(request: GenerationRequest, runs: int) -> str:
    """Describe in one line what is measured, and how often."""
    plural = "s" if runs > 1 else ""
    return f"{request.width}x{request.height}, {request.steps} steps; {runs} measured run{plural} after 1 to warm up"


def seconds(milliseconds: float) -> str:
    """Format a duration."""
    return f"{milliseconds / 1000:.3f} s"


def described_memory(peak: "PeakMemory") -> str:
    """Describe what a peak of memory counts."""
    return "allocated on CUDA devices" if peak.kind == "cuda" else "resident memory of the process, loading included"


def unavailable_lines(problems: Mapping[str, str]) -> list[str]:
    """Return a line for each attention backend that cannot run."""
    return [f"{name}: not available: {problem}" for name, problem in problems.items()]


def _tests(text: str) -> tuple[str, ...]:
    given = tuple(text.split(","))
    if unknown := [name for name in given if name not in TESTS]:
        raise argparse.ArgumentTypeError(f"must be encode, generate, or encode,generate, not `{unknown[0]}`")
    return given


def _phase_lines(measurement: "Measurement", tests: Sequence[str]) -> Iterable[str]:
    for name, spread in measurement.milliseconds.items():
        if name in ("encode", "total") and "encode" not in tests:
            continue
        values = (spread.median, spread.minimum, spread.maximum)
        yield f"{LABELS.get(name, name):30}" + "".join(f"{value / 1000:10.3f}" for value in values)


def _ranked_by(tests: Sequence[str]) -> str:
    return "total" if "encode" in tests else "generate"


def _fastest(outcomes: Iterable["Outcome"], tests: Sequence[str]) -> "Outcome | None":
    measured = {
        outcome.measurement.milliseconds[_ranked_by(tests)].median: outcome
        for outcome in outcomes
        if outcome.measurement
    }
    return measured[min(measured)] if measured else None


def _sweep_lines(outcomes: Sequence["Outcome"], tests: Sequence[str]) -> list[str]:
    phases = [name for name in ("encode", "generate", "total", "step") if name in (*tests, _ranked_by(tests), "step")]
    lines = [_row(("attention", "compiled", "quantization")) + "".join(f"{name:>11}" for name in phases)]
    lines[0] += f"{'min to max':>20}{'peak':>12}"
    for outcome in outcomes:
        start = _row(_cells(outcome.variation))
        if outcome.measurement is None:
            lines.append(f"{start}  failed: {outcome.problem}")
            continue
        found = outcome.measurement.milliseconds
        ranked = found[_ranked_by(tests)]
        medians = "".join(f"{seconds(found[name].median):>11}" for name in phases)
        extremes = f"{ranked.minimum / 1000:.3f} to {seconds(ranked.maximum)}"
        notes = "".join(f"  note: {fallback}" for fallback in outcome.measurement.fallbacks)
        lines.append(f"{start}{medians}{extremes:>20}{gib(outcome.measurement.peak_memory.size_bytes):>12}{notes}")
    measured = [outcome.measurement for outcome in outcomes if outcome.measurement]
    if measured:
        memory = described_memory(measured[0].peak_memory)
        lines.append(f"medians; min to max: {_ranked_by(tests)}; peak: {memory}")
    return lines


def _row(cells: Iterable[str]) -> str:
    return "".join(f"{cell:14}" for cell in cells)


def _cells(variation: "Variation") -> tuple[str, str, str]:
    return variation.attention_backend, "compiled" if variation.compile else "no", variation.quantization


def _settings_to_copy(chosen: ChosenSettings, variation: "Variation") -> list[str]:
    """Return the lines of the settings file that select a variation."""
    profile = chosen.settings.profile
    return [
        "",
        "the fastest, for config/config.toml:",
        "",
        f"[{profile}.pytorch]",
        f'attention_backend = "{variation.attention_backend}"',
        f"compile = {json.dumps(variation.compile)}",
        "",
        f"[{profile}.pipeline]",
        f'quantization = "{variation.quantization}"',
    ]

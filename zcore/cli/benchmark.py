"""`zimage benchmark attention`: the speed of each attention backend, and how far its image is from that of `sdpa`.

Prints a table or JSON.
"""

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from zcore.cli.measured_request import add_measuring_flags, measured_request
from zcore.cli.model_files import check_model_files
from zcore.cli.parser import Commands
from zcore.cli.profile import conditions, outcome_summary, request_summary, seconds, unavailable_lines
from zcore.cli.progress import ProgressLine
from zcore.cli.setting_flags import chosen_settings
from zcore.errors import ConfigurationError
from zcore.foreign_text import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zcore.cli.variations import Outcome

REFERENCE = "sdpa"

DESCRIPTION = """\
Generate the same image with every attention backend that can run here, and compare time and pixels with torch's own
attention (sdpa).

  zimage benchmark attention
  zimage benchmark attention --profile rtx4090 --size 1024x1024 "A cat sleeping in sunlight"

SSIM 1 and PSNR inf: the same pixels."""


@dataclass(frozen=True, slots=True)
class Similarity:
    """How similar an image is to that of `sdpa`. `psnr_db` is None for equal images, whose PSNR is infinite."""

    ssim: float
    psnr_db: float | None


def add_to(commands: Commands) -> None:
    """Add the command and its flags."""
    parser = commands.add_parser(
        "benchmark",
        usage="zimage benchmark attention [FLAGS] [PROMPT]",
        help="compare attention backends in speed and pixels",
        description=DESCRIPTION,
    )
    parser.add_argument("subject", metavar="SUBJECT", choices=("attention",), help="What to compare.")
    add_measuring_flags(parser)
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the comparison; the status is 1 if the reference failed. Raises `ZImageError`."""
    if "pytorch.attention_backend" in vars(arguments):
        raise ConfigurationError("--attention-backend: has no effect here, since every backend is measured")
    settings = chosen_settings(arguments).settings
    request = measured_request(arguments, settings)
    check_model_files(arguments, settings, ("text_encoder", "transformer", "vae"))
    with ProgressLine(sys.stderr, images=1) as line:
        line.show("looking for what can run ...")
        from zcore.cli.variations import Subject, backend_problems, backend_variations, measure_each  # loads torch

        subject = Subject.of(settings, request, arguments.runs)
        problems = backend_problems(subject.options)
        outcomes = measure_each(
            subject, backend_variations(subject.options), lambda one: line.show(f"{one.attention_backend} ...")
        )
    similarities = _similarities(outcomes)
    if arguments.json:
        report = {
            "request": request_summary(request),
            "backends": [_as_json(outcome, similarities) for outcome in outcomes],
            "unavailable": problems,
        }
        print(printable(json.dumps(report, ensure_ascii=False)))
    else:
        lines = [conditions(request, arguments.runs), "", *_lines(outcomes, similarities), *unavailable_lines(problems)]
        print("\n".join(map(printable, lines)))
    return 0 if REFERENCE in similarities else 1


def _similarities(outcomes: "Sequence[Outcome]") -> dict[str, Similarity]:
    """Return the similarity of each image to that of `sdpa`, by backend; empty if that failed."""
    from zcore.imaging.similarity import psnr_db, ssim

    images = {outcome.variation.attention_backend: outcome.image for outcome in outcomes if outcome.image is not None}
    reference = images.get(REFERENCE)
    if reference is None:
        return {}
    ratios = {name: psnr_db(image, reference) for name, image in images.items()}
    return {
        name: Similarity(ssim(image, reference), ratios[name] if math.isfinite(ratios[name]) else None)
        for name, image in images.items()
    }


def _as_json(outcome: "Outcome", similarities: dict[str, Similarity]) -> dict[str, Any]:
    similarity = similarities.get(outcome.variation.attention_backend)
    return {**outcome_summary(outcome), "similarity": asdict(similarity) if similarity else None}


def _lines(outcomes: "Sequence[Outcome]", similarities: dict[str, Similarity]) -> list[str]:
    lines = [f"{'attention':14}{'generate':>11}{'min to max':>20}{'step':>11}{'SSIM':>9}{'PSNR':>10}"]
    for outcome in outcomes:
        name = outcome.variation.attention_backend
        if outcome.measurement is None:
            lines.append(f"{name:14}  failed: {outcome.problem}")
            continue
        found = outcome.measurement.milliseconds
        generate = found["generate"]
        extremes = f"{generate.minimum / 1000:.3f} to {seconds(generate.maximum)}"
        times = f"{seconds(generate.median):>11}{extremes:>20}{seconds(found['step'].median):>11}"
        lines.append(f"{name:14}{times}{_similarity_cells(similarities.get(name))}")
    return lines


def _similarity_cells(similarity: Similarity | None) -> str:
    if similarity is None:
        return f"{'-':>9}{'-':>10}"
    ratio = "inf" if similarity.psnr_db is None else f"{similarity.psnr_db:.2f} dB"
    return f"{similarity.ssim:9.4f}{ratio:>10}"

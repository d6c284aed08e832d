"""The flags and the request that `zimage profile` and `zimage benchmark` share.

Both measure one image of a fixed prompt and seed, unless flags name others. Needs no torch.
"""

import argparse

from zcore.checkpoint.defaults import generation_defaults
from zcore.cli import setting_flags
from zcore.cli.invocation import check_template
from zcore.cli.request_flags import GROUPS, add_request_flags, given_fields
from zcore.cli.setting_flags import add_setting_flags
from zcore.request import GenerationRequest, parse_generation
from zcore.settings import Settings

FIELDS = (*GROUPS["prompt"], *GROUPS["size"], *(name for name in GROUPS["generation"] if name != "n"))
"""Request fields that determine the cost of one image."""

DEFAULTS = {"prompt": "a red star on a blue background", "seed": 42}


def add_measuring_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the request, of the settings, and of the runs."""
    parser.add_argument(
        "--runs",
        metavar="N",
        type=_count,
        default=3,
        help="Measured runs of each configuration, after one run to warm up. (default 3)",
    )
    parser.add_argument("--json", action="store_true", help="Print one line of JSON instead of tables.")
    add_request_flags(parser, FIELDS, prompt_required=False)
    add_setting_flags(parser, setting_flags.ALL)


def measured_request(arguments: argparse.Namespace, settings: Settings) -> GenerationRequest:
    """Return the request to measure. Raises `InvalidRequest`."""
    fields = {**DEFAULTS, **given_fields(arguments)}
    request = parse_generation(fields, generation_defaults(settings), settings.limits)
    check_template(request, settings)
    return request


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 1000, not `{text}`")
    return int(text)

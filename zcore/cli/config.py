"""`zimage config`: print the settings in effect and the source of each.

Masks secrets. Does not need torch.
"""

import argparse
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import msgspec

from zcore.cli import setting_flags
from zcore.cli.parser import Commands
from zcore.cli.request_flags import flag_of
from zcore.cli.setting_flags import ChosenSettings, add_setting_flags, chosen_settings, value_of
from zcore.errors import ConfigurationError, did_you_mean
from zcore.settings import setting_names

SECRETS = (
    "storage.access_key_id",
    "storage.secret_access_key",
    "storage.link_key",
    "server.api_keys",
    "server.admin_key",
    "webhooks.secret",
)
ADDRESSES = ("database.url", "broker.url")
"""Settings whose URL may contain a user name and a password."""

MASK = "***"

DEFAULTS_OF_FIELDS = {
    "width": "generation.width",
    "height": "generation.height",
    "steps": "generation.num_inference_steps",
    "guidance_scale": "generation.guidance_scale",
    "shift": "scheduler.shift",
    "hidden_layer": "encoder.hidden_layer",
    "long_prompt_mode": "pytorch.long_prompt_mode",
}
"""Settings that are the defaults of a request's fields."""

DESCRIPTION = """\
Show the settings in effect as `key = value`, each with its source: default, a table of the settings file, the
environment, or a flag. Secrets are masked.

  zimage config                               all settings
  zimage config --profile rtx4090             the settings of a profile
  zimage config pytorch                       one section
  zimage config pytorch.compile               one setting"""


def add_to(commands: Commands) -> None:
    """Add the command and its flags."""
    parser = commands.add_parser(
        "config", usage="zimage config [FLAGS] [KEY]", help="show the settings in effect", description=DESCRIPTION
    )
    parser.add_argument("key", metavar="KEY", nargs="?", help="Setting or section to show; all if omitted.")
    add_setting_flags(parser, setting_flags.ALL)
    parser.set_defaults(run=run, parser=parser)
    parser.hints = {
        flag_of(field): f"belongs to one request; the setting with its default is `--set {name}=...`"
        for field, name in DEFAULTS_OF_FIELDS.items()
    }


def run(arguments: argparse.Namespace) -> int:
    """Print the settings. Raises `ConfigurationError` if one is invalid or `arguments.key` is unknown."""
    chosen = chosen_settings(arguments)
    print("\n".join(setting_lines(chosen, _matching_names(arguments.key))))
    return 0


def setting_lines(chosen: ChosenSettings, names: Iterable[str]) -> list[str]:
    """Return `key = value  # source` for each of these settings, at least one."""
    lines = {name: f"{name} = {_displayed(name, value_of(chosen.settings, name))}" for name in names}
    width = min(72, max(map(len, lines.values())))
    return [f"{line:{width}}  # {chosen.origins[name]}" for name, line in lines.items()]


def _matching_names(key: str | None) -> list[str]:
    names = list(setting_names())
    found = [name for name in names if key is None or name == key or name.startswith(f"{key}.")]
    if not found:
        sections = {name.partition(".")[0] for name in names}
        hint = did_you_mean(key or "", [*sections, *names])
        raise ConfigurationError(f"`{key}` is neither a setting nor a section{hint}")
    return found


def _displayed(name: str, value: Any) -> str:
    """Return the value as JSON, which is also TOML for every value but null, with secrets masked."""
    if name in SECRETS and value:
        return MASK
    if name in ADDRESSES and value:
        return f'"{_without_credentials(value)}"'
    return msgspec.json.encode(value).decode()


def _without_credentials(address: str) -> str:
    """Mask the user information and the query, since either may contain a password."""
    parts = urlsplit(address)
    credentials, _, host = parts.netloc.rpartition("@")
    netloc = f"{MASK}@{host}" if credentials else host
    return urlunsplit((parts.scheme, netloc, parts.path, MASK if parts.query else "", ""))

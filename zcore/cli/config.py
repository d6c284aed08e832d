"""`zimage config`: the settings in force, and where each comes from.

Takes a command line; gives a table. Secrets are not shown. Needs no torch.
"""

import argparse
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import msgspec

from zcore.cli import setting_flags
from zcore.cli.parser import Commands
from zcore.cli.setting_flags import add_setting_flags, chosen_settings, value_of
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
"""Settings that may hold a user and a password in front of a host."""

MASK = "***"

DESCRIPTION = """\
The settings in force: `key = value`, and where the value comes from: default, a table of the settings file, the
environment, or a flag. Secrets are masked.

  zimage config                               all of them
  zimage config --profile rtx4090             those of a profile
  zimage config pytorch                       one section
  zimage config pytorch.compile               one setting"""


def add_to(commands: Commands) -> None:
    """The command with its flags."""
    parser = commands.add_parser(
        "config", usage="zimage config [FLAGS] [KEY]", help="show the settings in force", description=DESCRIPTION
    )
    parser.add_argument("key", metavar="KEY", nargs="?", help="A setting or a section; all where absent.")
    add_setting_flags(parser, setting_flags.ALL)
    parser.set_defaults(run=run, parser=parser)


def run(said: argparse.Namespace) -> int:
    """Print. Raises `ConfigurationError`."""
    chosen = chosen_settings(said)
    lines = {name: f"{name} = {_shown(name, value_of(chosen.settings, name))}" for name in _wanted(said.key)}
    width = min(72, max(map(len, lines.values())))
    for name, line in lines.items():
        print(f"{line:{width}}  # {chosen.origins[name]}")
    return 0


def _wanted(key: str | None) -> list[str]:
    names = list(setting_names())
    found = [name for name in names if key is None or name == key or name.startswith(f"{key}.")]
    if not found:
        sections = {name.partition(".")[0] for name in names}
        hint = did_you_mean(key or "", [*sections, *names])
        raise ConfigurationError(f"`{key}` is neither a setting nor a section{hint}")
    return found


def _shown(name: str, value: Any) -> str:
    """As TOML writes it, without what is nobody's business."""
    if name in SECRETS and value:
        return MASK
    if name in ADDRESSES and value:
        return f'"{_without_account(value)}"'
    return msgspec.json.encode(value).decode()


def _without_account(address: str) -> str:
    """Passwords stand before the host or in the query."""
    parts = urlsplit(address)
    host = parts.netloc.rpartition("@")
    netloc = f"{MASK}@{host[2]}" if host[1] else host[2]
    return urlunsplit((parts.scheme, netloc, parts.path, MASK if parts.query else "", ""))

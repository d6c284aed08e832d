"""`zimage config` shows the settings in effect and their sources, and no secrets."""

import pytest

from tests.unit.cli.conftest import Terminal
from zcore.cli.config import ADDRESSES, SECRETS
from zcore.settings import setting_names


def test_every_setting_is_shown_once(zimage: Terminal) -> None:
    rows = zimage("config").out.splitlines()
    assert [row.partition(" = ")[0] for row in rows] == list(setting_names())


def test_a_single_setting_or_section_can_be_shown(zimage: Terminal) -> None:
    assert zimage("config", "encoder.hidden_layer").out == "encoder.hidden_layer = -2  # config.toml [default]\n"
    assert zimage("config", "scheduler.shift").out == "scheduler.shift = null  # default\n"
    assert zimage("config", "slg").out.count("\n") == 5


def test_secrets_are_masked_and_passwords_removed_from_addresses(
    zimage: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZIMAGE_DATABASE__URL", "postgresql://me:unseen@host:5/name?password=unseen")
    monkeypatch.setenv("ZIMAGE_BROKER__URL", "redis://:unseen@host/0")
    monkeypatch.setenv("ZIMAGE_SERVER__API_KEYS", "{me = 'unseen'}")
    for name in SECRETS:
        if name != "server.api_keys":
            monkeypatch.setenv(f"ZIMAGE_{name.upper().replace('.', '__')}", "unseen")
    shown = zimage("config").out
    assert "unseen" not in shown
    assert 'database.url = "postgresql://***@host:5/name?***"' in shown
    assert 'broker.url = "redis://***@host/0"' in shown
    assert shown.count(" = ***") == len(SECRETS)


def test_every_setting_with_the_name_of_a_secret_is_treated_as_one() -> None:
    suspects = [
        name for name in setting_names() if any(word in name for word in ("key", "secret", "password", "token"))
    ]
    addresses = [name for name in setting_names() if name.endswith(".url")]
    assert set(suspects) - {"server.keyless", "image_files.c2pa_key"} == set(SECRETS)  # a switch, and a file's path
    assert set(addresses) <= set(ADDRESSES)

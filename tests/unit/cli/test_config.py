"""`zimage config` shows what is in force and where it comes from, and no secret."""

import pytest

from tests.unit.cli.conftest import Terminal
from zcore.cli.config import ADDRESSES, SECRETS
from zcore.settings import setting_names


def test_every_setting_is_shown_once(zimage: Terminal) -> None:
    rows = zimage("config").out.splitlines()
    assert [row.partition(" = ")[0] for row in rows] == list(setting_names())


def test_one_setting_or_one_section_can_be_asked_for(zimage: Terminal) -> None:
    assert zimage("config", "scheduler.shift").out == "scheduler.shift = 3.0  # config.toml [default]\n"
    assert zimage("config", "slg").out.count("\n") == 5


def test_secrets_are_masked_and_passwords_left_out_of_addresses(
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


def test_a_new_setting_that_sounds_like_a_secret_has_to_be_named_one() -> None:
    sounding = [
        name for name in setting_names() if any(word in name for word in ("key", "secret", "password", "token"))
    ]
    addresses = [name for name in setting_names() if name.endswith(".url")]
    assert set(sounding) <= set(SECRETS)
    assert set(addresses) <= set(ADDRESSES)

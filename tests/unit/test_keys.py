"""Secrets of an installation: generated once, stored, and never empty."""

import stat
from pathlib import Path

import pytest

from zcore.errors import ConfigurationError
from zcore.keys import load_keys
from zcore.settings import Settings, load_settings


def settings(folder: Path, **values: str) -> Settings:
    names = {f"ZIMAGE_{name.upper()}": value for name, value in values.items()}
    return load_settings({"ZIMAGE_DATA_DIR": str(folder), **names})


def test_secrets_are_generated_once_and_readable_only_by_their_owner(tmp_path: Path) -> None:
    generated = load_keys(settings(tmp_path))
    assert load_keys(settings(tmp_path)) == generated
    assert len({generated.admin, generated.api["local"], generated.link, generated.webhook}) == 4
    files = list((tmp_path / "keys").iterdir())
    assert sorted(path.name for path in files) == ["admin", "api", "link", "webhook"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


def test_a_secret_that_an_editor_saved_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "admin").write_text("a key from an editor\r\n", encoding="utf-8-sig")
    assert load_keys(settings(tmp_path)).admin == "a key from an editor"
    (tmp_path / "keys" / "admin").write_text("a key from an editor", encoding="utf-16")
    with pytest.raises(ConfigurationError, match="admin: is not text in UTF-8"):
        load_keys(settings(tmp_path))


def test_configured_secrets_are_used_unchanged(tmp_path: Path) -> None:
    assert load_keys(settings(tmp_path, server__admin_key="a configured key")).admin == "a configured key"
    assert not (tmp_path / "keys" / "admin").exists()


@pytest.mark.parametrize("name", ["admin", "api", "link", "webhook"])
def test_an_empty_secret_on_disk_is_refused(tmp_path: Path, name: str) -> None:
    load_keys(settings(tmp_path))
    (tmp_path / "keys" / name).write_text("")
    with pytest.raises(ConfigurationError, match=f"{name}: is empty"):
        load_keys(settings(tmp_path))


@pytest.mark.parametrize("name", ["server__admin_key", "storage__link_key"])
@pytest.mark.parametrize("secret", [" " * 20, "short", "15 characters.."])
def test_a_guessable_secret_is_refused_with_the_way_to_make_one(tmp_path: Path, name: str, secret: str) -> None:
    with pytest.raises(ConfigurationError, match=name.replace("__", ".") + ": must have at least 16 .* generate one"):
        load_keys(settings(tmp_path, **{name: secret}))


def test_a_guessable_api_key_is_refused_by_the_name_of_its_owner(tmp_path: Path) -> None:
    keys = '{ anna = "anna-key-0123456789", ben = "a" }'
    with pytest.raises(ConfigurationError, match=r"server\.api_keys\.ben: must have at least 16 characters") as refused:
        load_keys(settings(tmp_path, server__api_keys=keys))
    assert "anna" not in str(refused.value)


def test_configured_api_keys_and_a_keyless_service_need_no_generated_one(tmp_path: Path) -> None:
    configured = load_keys(settings(tmp_path, server__api_keys='{ anna = "anna-key-0123456789" }'))
    assert configured.api == {"anna": "anna-key-0123456789"}
    assert load_keys(settings(tmp_path, server__keyless="true")).api == {}
    assert not (tmp_path / "keys" / "api").exists()


def test_an_empty_api_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="API_KEYS"):
        settings(tmp_path, server__api_keys='{ anna = "" }')

"""The secrets of an installation: made once, kept, and never empty."""

import stat
from pathlib import Path

import pytest

from zcore.errors import ConfigurationError
from zcore.keys import load_keys
from zcore.settings import Settings, load_settings


def settings(folder: Path, **given: str) -> Settings:
    names = {f"ZIMAGE_{name.upper()}": value for name, value in given.items()}
    return load_settings({"ZIMAGE_DATA_DIR": str(folder), **names})


def test_secrets_are_made_once_and_only_their_owner_can_read_them(tmp_path: Path) -> None:
    made = load_keys(settings(tmp_path))
    assert load_keys(settings(tmp_path)) == made
    assert len({made.admin, made.link, made.webhook}) == 3
    kept = list((tmp_path / "keys").iterdir())
    assert sorted(path.name for path in kept) == ["admin", "link", "webhook"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in kept} == {0o600}


def test_configured_secrets_are_taken_as_they_are(tmp_path: Path) -> None:
    assert load_keys(settings(tmp_path, server__admin_key="a configured key")).admin == "a configured key"
    assert not (tmp_path / "keys" / "admin").exists()


@pytest.mark.parametrize("name", ["admin", "link", "webhook"])
def test_an_empty_secret_on_disk_opens_nothing(tmp_path: Path, name: str) -> None:
    load_keys(settings(tmp_path))
    (tmp_path / "keys" / name).write_text("")
    with pytest.raises(ConfigurationError, match=f"{name}: is empty"):
        load_keys(settings(tmp_path))


@pytest.mark.parametrize("name", ["server__admin_key", "storage__link_key"])
@pytest.mark.parametrize("secret", ["   ", "short"])
def test_a_secret_that_anybody_could_guess_is_refused(tmp_path: Path, name: str, secret: str) -> None:
    with pytest.raises(ConfigurationError, match=name.replace("__", ".")):
        load_keys(settings(tmp_path, **{name: secret}))


def test_an_empty_api_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="API_KEYS"):
        settings(tmp_path, server__api_keys='{ anna = "" }')

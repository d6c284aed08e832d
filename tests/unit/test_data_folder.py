"""Other users of the host cannot read what the service stores."""

import os
import stat
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from zcore.data_folder import make_private
from zcore.keys import load_keys
from zcore.settings import Settings, load_settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings({"ZIMAGE_DATA_DIR": str(tmp_path / "data")})


@pytest.fixture
def folder(settings: Settings) -> Path:
    """A data folder that everyone may read, as an earlier version created it."""
    path = settings.data_path
    for one in (path, path / "storage", path / "log", path / "broker"):
        one.mkdir()
        one.chmod(0o755)
    (path / "zimage.db").touch()
    (path / "zimage.db").chmod(0o644)
    return path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_folder_that_secrets_create_is_private_under_any_umask(settings: Settings) -> None:
    before = os.umask(0)
    try:
        load_keys(settings)
    finally:
        os.umask(before)
    assert {mode(settings.data_path), mode(settings.data_path / "keys")} == {0o700}


def test_wider_rights_are_taken_away_once_and_logged(settings: Settings, folder: Path) -> None:
    with capture_logs() as logged:
        make_private(settings)
        make_private(settings)
    assert {path.name: mode(path) for path in [folder, *folder.iterdir()]} == {
        "data": 0o700, "storage": 0o700, "log": 0o700, "broker": 0o700, "zimage.db": 0o600,
    }  # fmt: skip
    assert [line["event"] for line in logged] == ["data_dir.made_private"] * 5


def test_a_shared_folder_keeps_its_rights_but_what_is_ours_in_it_is_private(settings: Settings, folder: Path) -> None:
    folder.chmod(0o1777)
    other = folder / "of another program"
    other.touch(mode=0o644)
    with capture_logs() as logged:
        make_private(settings)
    assert (mode(folder), mode(folder / "storage"), mode(folder / "zimage.db")) == (0o1777, 0o700, 0o600)
    assert mode(other) == 0o644
    assert [line["path"] for line in logged if line["event"] == "data_dir.readable_by_others"] == [str(folder)]


def test_a_folder_without_data_of_ours_is_not_touched(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    make_private(load_settings({"ZIMAGE_DATA_DIR": str(tmp_path)}))
    make_private(load_settings({"ZIMAGE_DATA_DIR": str(tmp_path / "missing")}))
    assert mode(tmp_path) == 0o755


def test_what_another_user_owns_is_only_reported(
    settings: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with capture_logs() as logged:
        make_private(settings)
    assert mode(folder) == 0o755
    assert {line["event"] for line in logged} == {"data_dir.readable_by_others"}

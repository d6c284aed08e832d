"""`zimage c2pa-certificate` makes what signs images; `zimage inspect` shows who signed them."""

import json
import stat
from pathlib import Path

import pytest

from tests.unit.cli.conftest import Terminal

SMALL = ("--profile", "demo", "--size", "64x64", "--steps", "2")


def test_its_settings_sign_images_and_inspect_names_the_signer(zimage: Terminal, tmp_path: Path) -> None:
    data = ("--set", f"data_dir={tmp_path}")
    made = zimage("c2pa-certificate", "--organization", "Example Ltd", *data)
    assert made.status == 0
    settings = [line for line in made.out.splitlines() if not line.startswith("#")]
    assert [line.partition("=")[0] for line in settings] == ["image_files.c2pa_certificate", "image_files.c2pa_key"]
    folder = tmp_path / "keys" / "c2pa"
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}
    zimage("generate", "a star", *SMALL, *(word for line in settings for word in ("--set", line)))
    zimage("generate", "a star", *SMALL, "--output", "plain.webp")
    signed, plain = zimage("inspect", "--json", "output.png", "plain.webp").out.splitlines()
    expected = {"signed_by": "Example Ltd trial signer", "issuer": "Example Ltd", "state": "valid"}
    assert json.loads(signed)["credentials"] == expected
    assert json.loads(signed)["request"]["prompt"] == "a star"
    assert "credentials" not in json.loads(plain)
    shown = zimage("inspect", "output.png", "plain.webp").out.splitlines()
    line = "  signed by Example Ltd trial signer (Example Ltd); signature valid, signer not on a trust list"
    assert line in shown
    assert "  not signed" in shown
    again = zimage("c2pa-certificate", *data)
    assert (again.status, again.out) == (2, "")
    assert f"{folder / 'certificate.pem'} exists already" in again.err


@pytest.mark.parametrize("organization", ["", "x" * 52, "ü" * 26])
def test_a_name_that_no_certificate_can_hold_is_refused(zimage: Terminal, tmp_path: Path, organization: str) -> None:
    finished = zimage("c2pa-certificate", "--organization", organization, "--set", f"data_dir={tmp_path}")
    assert finished.status == 2
    assert finished.err == "zimage: --organization: must be text of 1 to 51 bytes in UTF-8\n"
    longest = zimage("c2pa-certificate", "--organization", "x" * 51, "--set", f"data_dir={tmp_path}")
    assert longest.status == 0


def test_a_certificate_without_a_key_ends_before_the_model_is_loaded(zimage: Terminal) -> None:
    finished = zimage("generate", "a star", *SMALL, "--set", "image_files.c2pa_certificate=chain.pem")
    assert finished.status == 2
    assert "image_files.c2pa_key: must be set if image_files.c2pa_certificate is" in finished.err

"""Run the command line in this process, in an empty working folder, with the demo checkpoint."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from zcore.cli import main

TREE = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Finished:
    """Exit status and output of a command line."""

    status: int
    out: str
    err: str


class Terminal:
    """Runs command lines in one folder, as a person at a terminal does."""

    def __init__(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        self.folder = folder
        self._capsys = capsys

    def __call__(self, *arguments: str) -> Finished:
        status = main(arguments)
        captured = self._capsys.readouterr()
        return Finished(status, captured.out, captured.err)

    def generate(self, *arguments: str) -> Finished:
        """Run `zimage generate` with the demo checkpoint; it has to succeed with nothing on standard error."""
        finished = self("generate", "--profile", "demo", *arguments)
        assert (finished.status, finished.err) == (0, "")
        return finished


@pytest.fixture
def zimage(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """The command line in an empty folder."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return Terminal(capsys, folder)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread: with networks this small, a second one only costs time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def settings_file(tmp_path: Path) -> Any:
    """Return a function that writes a settings file and returns its path."""

    def write(text: str) -> str:
        path = tmp_path / "config.toml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write

"""The command line in this process, in an empty working folder, on the demo checkpoint."""

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
    """How a command line ended, and what it said."""

    status: int
    out: str
    err: str


class Terminal:
    """Runs command lines as a person does, in the folder that it stands in."""

    def __init__(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        self.folder = folder
        self._capsys = capsys

    def __call__(self, *arguments: str) -> Finished:
        status = main(arguments)
        captured = self._capsys.readouterr()
        return Finished(status, captured.out, captured.err)

    def paint(self, *arguments: str) -> Finished:
        """`zimage generate` with the demo checkpoint; has to succeed without a word on standard error."""
        finished = self("generate", "--profile", "demo", *arguments)
        assert (finished.status, finished.err) == (0, "")
        return finished


@pytest.fixture
def zimage(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """The command line."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return Terminal(capsys, folder)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Networks this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def settings_file(tmp_path: Path) -> Any:
    """Writes a file of settings and gives its path."""

    def write(text: str) -> str:
        path = tmp_path / "config.toml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write

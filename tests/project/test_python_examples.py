"""The Python of the documentation runs as it is shown, on the demo model."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from zcore import GenerationDefaults, LoadOptions

TREE = Path(__file__).resolve().parents[2]
PAGES = sorted({*TREE.glob("*.md"), *TREE.glob("docs/**/*.md"), *TREE.glob("z*/**/*.md"), *TREE.glob("worker/**/*.md")})
FENCED = re.compile(r"^( *)```python\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
DEMO = "zcore/demo/checkpoint"


def blocks(page: Path) -> list[str]:
    """Return the fenced Python blocks of a page, in order."""
    return [code for _indent, code in FENCED.findall(page.read_text(encoding="utf-8"))]


def unfenced(page: Path) -> list[str]:
    """Return the indented blocks of a page that are Python and therefore would not run."""
    indented = re.findall(
        r"(?:^    .+\n(?:\n(?=    ))?)+", FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE
    )
    return [
        block
        for block in indented
        if re.search(r"^    (from \w+[\w.]* import |import \w|pipe\b|\w+ = pipe)", block, re.M)
    ]


EXAMPLES = [page for page in PAGES if blocks(page)]


def test_there_are_examples() -> None:
    assert {TREE / "README.md", TREE / "docs" / "python.md"} <= set(EXAMPLES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(TREE)))
def test_python_is_fenced_so_that_it_runs(page: Path) -> None:
    assert unfenced(page) == []


@pytest.mark.parametrize("page", EXAMPLES, ids=lambda page: str(page.relative_to(TREE)))
def test_every_example_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of one page share their names, as a reader would type them.

    They run in a folder with the demo checkpoint and an image; a checkpoint's path is replaced by that of the demo, and
    the default size and number of steps by small ones.
    """
    ensure_world(tmp_path)
    monkeypatch.setattr(LoadOptions, "generation_defaults", lambda *_: GenerationDefaults(width=64, height=64, steps=2))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": page.stem}
    for code in blocks(page):
        exec(compile(re.sub(r'"(/models|/path/to)/[\w-]+"', f'"{DEMO}"', code), str(page), "exec"), names)
    assert torch.is_grad_enabled()


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread: with networks this small, a second one only costs time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ensure_world(folder: Path) -> None:
    """Put what the examples read into their folder."""
    for name in ("templates", "zcore"):
        (folder / name).symlink_to(TREE / name)
    for name, source in (("photo.png", "inpainting-input.png"), ("mask.png", "inpainting-mask.png")):
        with Image.open(TREE / "docs" / "images" / source) as image:
            image.resize((64, 64)).save(folder / name)

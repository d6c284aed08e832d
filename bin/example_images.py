"""Generate the images of the documentation with the commands that its pages show.

    make example-images

Runs every indented `zimage` command in `docs/capabilities/*.md`, page by page and in order, in a given folder: the
source tree for `make example-images`, a temporary folder for the test that compares the images. Commands in a fenced
block are not run: they have placeholders, or leave files behind.
"""

import contextlib
import os
import re
import shlex
from pathlib import Path

import torch

from zcore.cli import main

TREE = Path(__file__).resolve().parent.parent
PAGES = TREE / "docs" / "capabilities"
NOT_GENERATED = ("docs/images/inpainting-mask.png",)
"""Images that the pages use but that no command generates."""


def commands(page: Path) -> list[list[str]]:
    """Return the arguments of each `zimage` command on the page, in order."""
    lines = re.findall(r"^    zimage (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [shlex.split(line) for line in lines]


def generate(folder: Path) -> None:
    """Run all commands in `folder`, which the paths on the pages are relative to.

    Raises `RuntimeError` naming the first command that fails.
    """
    torch.set_num_threads(1)  # more threads would add in another order, which changes the last bits
    for name in ("docs/images", "var"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with contextlib.chdir(folder):
        for page in sorted(PAGES.glob("*.md")):
            for arguments in commands(page):
                if (status := main(arguments)) != 0:
                    raise RuntimeError(f"{page.name}: zimage {shlex.join(arguments)}: exit status {status}")


if __name__ == "__main__":
    os.environ.pop("ZIMAGE_CONFIG", None)
    generate(TREE)

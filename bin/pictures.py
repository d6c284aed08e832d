"""Paints the pictures of the documentation, by the very commands that its pages show.

Every line of `docs/capabilities/*.md` that is a `zimage` command is run, page by page and in order, from a folder of
choice: the source tree for `make pictures`, a temporary one for the test that compares.
"""

import contextlib
import os
import re
import shlex
import sys
from pathlib import Path

TREE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TREE))
PAGES = TREE / "docs" / "capabilities"
GIVEN = ("docs/images/inpainting-mask.png",)
"""Pictures that pages use and no command paints."""


def commands(page: Path) -> list[list[str]]:
    """The arguments of each command that the page shows, in order."""
    lines = re.findall(r"^    zimage (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [shlex.split(line) for line in lines]


def paint(folder: Path) -> None:
    """Run them all from this folder, where paths of the pages begin. Raises RuntimeError naming one that fails."""
    import torch

    from zcore.cli import main

    torch.set_num_threads(1)  # sums over other partitions differ in their last bits
    for name in ("docs/images", "var"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with contextlib.chdir(folder):
        for page in sorted(PAGES.glob("*.md")):
            for arguments in commands(page):
                if (status := main(arguments)) != 0:
                    raise RuntimeError(f"{page.name}: zimage {shlex.join(arguments)}: status {status}")


if __name__ == "__main__":
    os.environ.pop("ZIMAGE_CONFIG", None)
    paint(TREE)

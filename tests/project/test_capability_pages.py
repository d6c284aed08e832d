"""The pages about capabilities show what their commands paint."""

import importlib.util
import re
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

TREE = Path(__file__).resolve().parents[2]
PAGES = sorted((TREE / "docs" / "capabilities").glob("*.md"))
ALIKE = 2.0
"""Mean difference, of 255 levels, within which two pictures are the same: other processors round otherwise."""


@pytest.fixture(scope="module")
def pictures() -> ModuleType:
    """`bin/pictures.py`."""
    spec = importlib.util.spec_from_file_location("pictures", TREE / "bin" / "pictures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def painted(pictures: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the pages' commands make."""
    folder = tmp_path_factory.mktemp("pages")
    for given in pictures.GIVEN:
        (folder / given).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(TREE / given, folder / given)
    threads = torch.get_num_threads()
    pictures.paint(folder)
    torch.set_num_threads(threads)
    return folder


def shown_on(page: Path) -> set[str]:
    return {f"docs/images/{name}" for name in re.findall(r"\(\.\./images/([\w.-]+)\)", page.read_text())}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_picture_of_a_page_is_what_its_commands_paint(page: Path, pictures: ModuleType, painted: Path) -> None:
    written = {
        arguments[arguments.index("--output") + 1] for arguments in pictures.commands(page) if "--output" in arguments
    }
    shown = shown_on(page)
    assert shown, "a capability is shown by a picture"
    assert shown <= {*written, *pictures.GIVEN}
    for name in shown:
        committed, fresh = (
            np.asarray(Image.open(folder / name).convert("RGB"), np.float32) for folder in (TREE, painted)
        )
        assert committed.shape == fresh.shape, name
        assert np.abs(committed - fresh).mean() < ALIKE, f"{name} is old: make pictures"


def test_a_picture_painted_again_from_its_file_is_the_same_file(painted: Path) -> None:
    assert (painted / "var/again.webp").read_bytes() == (painted / "docs/images/formats.webp").read_bytes()


def test_the_kept_half_of_the_inpainted_picture_is_the_inputs_own(painted: Path) -> None:
    before, mask, after = (
        np.asarray(Image.open(painted / f"docs/images/inpainting{name}.png").convert("RGB"))
        for name in ("-input", "-mask", "")
    )
    kept = mask[..., 0] == 0
    assert 0.4 < kept.mean() < 0.6
    assert np.array_equal(before[kept], after[kept])
    assert not np.array_equal(before[~kept], after[~kept])


def test_every_page_is_linked_from_the_readme() -> None:
    readme = (TREE / "README.md").read_text()
    assert [page.name for page in PAGES if f"docs/capabilities/{page.name}" not in readme] == []

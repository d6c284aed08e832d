"""The pages about capabilities show the images that their commands generate."""

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
"""Mean difference, of 255 levels, up to which two images count as the same: processors round differently."""


@pytest.fixture(scope="module")
def example_images() -> ModuleType:
    """`bin/example_images.py`."""
    spec = importlib.util.spec_from_file_location("example_images", TREE / "bin" / "example_images.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generated(example_images: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all files that the commands of the pages write."""
    folder = tmp_path_factory.mktemp("pages")
    for given in example_images.NOT_GENERATED:
        (folder / given).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(TREE / given, folder / given)
    threads = torch.get_num_threads()
    example_images.generate(folder)
    torch.set_num_threads(threads)
    return folder


def shown_on(page: Path) -> set[str]:
    return {f"docs/images/{name}" for name in re.findall(r"\(\.\./images/([\w.-]+)\)", page.read_text())}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_image_of_a_page_is_what_its_commands_generate(
    page: Path, example_images: ModuleType, generated: Path
) -> None:
    written = {
        arguments[arguments.index("--output") + 1]
        for arguments in example_images.commands(page)
        if "--output" in arguments
    }
    shown = shown_on(page)
    assert shown, "a page about a capability shows an image"
    assert shown <= {*written, *example_images.NOT_GENERATED}
    for name in shown:
        committed, fresh = (
            np.asarray(Image.open(folder / name).convert("RGB"), np.float32) for folder in (TREE, generated)
        )
        assert committed.shape == fresh.shape, name
        assert np.abs(committed - fresh).mean() < ALIKE, f"{name} is outdated: make example-images"


def test_an_image_generated_again_from_its_file_is_the_same_file(generated: Path) -> None:
    assert (generated / "var/again.webp").read_bytes() == (generated / "docs/images/formats.webp").read_bytes()


def test_the_preserved_half_of_the_inpainted_image_is_the_inputs_own(generated: Path) -> None:
    before, mask, after = (
        np.asarray(Image.open(generated / f"docs/images/inpainting{name}.png").convert("RGB"))
        for name in ("-input", "-mask", "")
    )
    preserved = mask[..., 0] == 0
    assert 0.4 < preserved.mean() < 0.6
    assert np.array_equal(before[preserved], after[preserved])
    assert not np.array_equal(before[~preserved], after[~preserved])


def test_every_page_is_linked_from_the_readme() -> None:
    readme = (TREE / "README.md").read_text()
    assert [page.name for page in PAGES if f"docs/capabilities/{page.name}" not in readme] == []

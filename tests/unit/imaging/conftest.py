"""A tiny checkpoint, and a pipeline on it."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.unit.imaging.tiny_checkpoint import build_tiny_checkpoint
from zcore.imaging.pipeline import ZImagePipeline

TREE = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: small networks gain little from a second, and on a busy machine waiting for it costs tenfold."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def earlier_objects_frozen() -> Iterator[None]:
    """Leave what earlier modules loaded out of garbage collections, which several tests and the fallback run often.

    Going through everything that a whole run has imported takes a collection more than a second.
    """
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights. Tests must not write to it."""
    return build_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The checkpoint that ships with the service."""
    return TREE / "zcore" / "demo" / "checkpoint"


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_folder: Path) -> ZImagePipeline:
    """The tiny checkpoint in float32 on the CPU, with the shipped templates."""
    return ZImagePipeline.from_pretrained(
        tiny_folder,
        templates_dir=TREE / "templates" / "z_image",
        torch_dtype=torch.float32,
        encoder_device="cpu",
        dit_device="cpu",
        vae_device="cpu",
    )

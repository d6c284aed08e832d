"""The LoRAs of a worker: found by name, kept within a bound, read anew when they change."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.integration.worker.conftest import Studio
from tests.integration.worker.painter import Painter
from worker.loras import FolderOfLoras, LoraShelf, RegisteredLoras
from zcore.errors import InputUnavailable, InvalidRequest
from zcore.jobs import loras


@dataclass(frozen=True)
class Weights:
    """As `zcore.imaging.model.lora.LoraWeights`, which would load torch."""

    name: str
    content: bytes

    @property
    def size_bytes(self) -> int:
        return len(self.content)


def unheard(_relief: Any) -> None:
    """Memory suffices."""


@dataclass
class Loader:
    """Counts what it makes ready."""

    loaded: list[str] = field(default_factory=list)

    def __call__(self, content: bytes, name: str, on_relief: Any) -> Any:
        self.loaded.append(name)
        return Weights(name, content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("night", "outline", "noon"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"x" * 10)
    (tmp_path / "notes.txt").write_text("none")
    return tmp_path


def test_what_is_wanted_again_is_not_loaded_again(folder: Path) -> None:
    load = Loader()
    shelf = LoraShelf([FolderOfLoras(folder)], load, limit_bytes=30)
    first = shelf.get("night", unheard)
    shelf.get("outline", unheard)
    assert shelf.get("night", unheard) is first
    assert load.loaded == ["night", "outline"]


def test_the_longest_unused_makes_room(folder: Path) -> None:
    load = Loader()
    shelf = LoraShelf([FolderOfLoras(folder)], load, limit_bytes=20)
    for name in ("night", "outline", "night", "noon", "night", "outline"):
        assert shelf.get(name, unheard).name == name
        assert shelf.kept_bytes <= 20
    assert load.loaded == ["night", "outline", "noon", "outline"]


def test_one_larger_than_the_bound_is_given_and_not_kept(folder: Path) -> None:
    shelf = LoraShelf([FolderOfLoras(folder)], Loader(), limit_bytes=9)
    assert shelf.get("night", unheard).name == "night"
    assert shelf.kept_bytes == 0


def test_a_file_that_changed_is_read_anew(folder: Path) -> None:
    shelf = LoraShelf([FolderOfLoras(folder)], Loader(), limit_bytes=100)
    shelf.get("night", unheard)
    path = folder / "night.safetensors"
    path.write_bytes(b"y" * 10)
    os.utime(path, ns=(1, 1))
    assert shelf.get("night", unheard).content == b"y" * 10  # pyright: ignore[reportAttributeAccessIssue]
    path.unlink()
    with pytest.raises(InvalidRequest):
        shelf.get("night", unheard)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("nigth", "loras: there is no LoRA `nigth`; did you mean `night`?"),
        ("notes", "loras: there is no LoRA `notes`"),
        ("../night", "loras: there is no LoRA `../night`"),
    ],
)
def test_a_name_that_is_nowhere_is_refused_with_near_ones(folder: Path, name: str, complaint: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        LoraShelf([FolderOfLoras(folder)], Loader(), limit_bytes=100).get(name, unheard)
    assert refused.value.message.startswith(complaint)


def test_without_a_folder_there_is_none() -> None:
    with pytest.raises(InvalidRequest, match=r"there is no LoRA `night`$"):
        LoraShelf([FolderOfLoras(None)], Loader(), limit_bytes=100).get("night", unheard)


def test_a_job_gets_its_loras_and_one_that_names_another_fails_for_good(studio: Studio, folder: Path) -> None:
    shelf = LoraShelf([FolderOfLoras(folder)], Loader(), limit_bytes=100)
    good = studio.submit(loras=[{"name": "night", "scale": 0.5}, {"name": "noon"}])
    bad = studio.submit(loras=[{"name": "dusk"}])
    painter = Painter()
    studio.work(painter=painter, loras=shelf)
    assert studio.look(good).status == "succeeded"
    assert painter.given[0].loras.keys() == {"night", "noon"}
    failed = studio.look(bad)
    assert (failed.status, failed.attempt, failed.error_code) == ("failed", 1, "invalid_request")
    assert "there is no LoRA `dusk`" in str(failed.error_message)


def test_the_library_reaches_the_worker(studio: Studio) -> None:
    studio.storage.put(loras.key_of("dawn", "0a"), b"z" * 10, "application/octet-stream")
    with studio.database.write() as transaction:
        loras.register(transaction, loras.UploadedLora("dawn", "0a", "MIT", 10))
    shelf = LoraShelf([FolderOfLoras(None), RegisteredLoras(studio.database, studio.storage)], Loader(), 100)
    assert shelf.get("dawn", unheard).content == b"z" * 10  # pyright: ignore[reportAttributeAccessIssue]
    with studio.database.write() as transaction:
        assert loras.remove(transaction, "dawn") == loras.key_of("dawn", "0a")
    with pytest.raises(InvalidRequest):
        shelf.get("dawn", unheard)


def test_one_that_cannot_be_read_fails_its_job_and_not_the_worker(studio: Studio, folder: Path) -> None:
    (folder / "dusk.safetensors").mkdir()
    (folder / "gone.safetensors").symlink_to(folder / "nowhere")
    unreadable, gone = studio.submit(loras=[{"name": "dusk"}]), studio.submit(loras=[{"name": "gone"}])
    studio.work(loras=LoraShelf([FolderOfLoras(folder)], Loader(), limit_bytes=100))
    assert not studio.broken.is_set()
    for job_id, complaint in ((unreadable, "`dusk.safetensors` cannot be read"), (gone, "there is no LoRA `gone`")):
        job = studio.look(job_id)
        assert (job.status, job.attempt, job.error_code) == ("failed", 1, "invalid_request")
        assert complaint in str(job.error_message)


def test_a_registered_file_that_is_gone_is_looked_for_again_and_then_named(studio: Studio) -> None:
    with studio.database.write() as transaction:
        loras.register(transaction, loras.UploadedLora("dawn", "0a", "MIT", 10))
    job_id = studio.submit(loras=[{"name": "dawn"}])
    library = RegisteredLoras(studio.database, studio.storage)
    studio.work(loras=LoraShelf([library], Loader(), limit_bytes=100))
    job = studio.look(job_id)
    assert (job.status, job.attempt, job.error_code) == ("failed", 3, "input_unavailable")
    with pytest.raises(InputUnavailable, match="loras: the file of `dawn` is not in storage"):
        LoraShelf([library], Loader(), limit_bytes=100).get("dawn", unheard)

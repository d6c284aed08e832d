"""The LoRAs of a worker: found by name, cached up to a limit, and loaded again when they change."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.integration.worker.conftest import Environment
from tests.integration.worker.stand_in_pipeline import StandInPipeline
from worker.inputs.lora_cache import LoraCache
from worker.inputs.lora_sources import LoraFolder, RegisteredLoras
from zcore.errors import InputUnavailable, InvalidRequest
from zcore.jobs import lora_library

DAWN_KEY = "loras/dawn/0a.safetensors"


@dataclass(frozen=True)
class Weights:
    """Stand-in for `zcore.imaging.lora.adapters.LoraWeights`, which would load torch."""

    name: str
    content: bytes

    @property
    def size_bytes(self) -> int:
        return len(self.content)


def loaded(cache: LoraCache, name: str) -> Any:
    """Return a LoRA from a cache, for a job that is not interrupted."""
    return cache.get(name, ignore_fallback, lambda: None)


def ignore_fallback(_step: Any) -> None:
    """Ignore out-of-memory fallback steps."""


@dataclass
class Loader:
    """Records the names of the LoRAs that it loads, and which of them are strict."""

    loaded: list[str] = field(default_factory=list)
    strict: list[bool] = field(default_factory=list)

    def __call__(self, content: bytes, name: str, on_fallback: Any, /, *, strict: bool) -> Any:
        self.loaded.append(name)
        self.strict.append(strict)
        return Weights(name, content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("night", "outline", "noon"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"x" * 10)
    (tmp_path / "notes.txt").write_text("not a LoRA")
    return tmp_path


def test_a_cached_lora_is_not_loaded_again(folder: Path) -> None:
    load = Loader()
    cache = LoraCache([LoraFolder(folder)], load, limit_bytes=30)
    first = loaded(cache, "night")
    loaded(cache, "outline")
    assert loaded(cache, "night") is first
    assert load.loaded == ["night", "outline"]


def test_the_least_recently_used_lora_is_evicted(folder: Path) -> None:
    load = Loader()
    cache = LoraCache([LoraFolder(folder)], load, limit_bytes=20)
    for name in ("night", "outline", "night", "noon", "night", "outline"):
        assert loaded(cache, name).name == name
        assert cache.cached_bytes <= 20
    assert load.loaded == ["night", "outline", "noon", "outline"]


def test_a_lora_larger_than_the_limit_is_returned_and_not_cached(folder: Path) -> None:
    cache = LoraCache([LoraFolder(folder)], Loader(), limit_bytes=9)
    assert loaded(cache, "night").name == "night"
    assert cache.cached_bytes == 0


def test_a_changed_file_is_loaded_again(folder: Path) -> None:
    cache = LoraCache([LoraFolder(folder)], Loader(), limit_bytes=100)
    loaded(cache, "night")
    path = folder / "night.safetensors"
    path.write_bytes(b"y" * 10)
    os.utime(path, ns=(1, 1))
    assert loaded(cache, "night").content == b"y" * 10
    path.unlink()
    with pytest.raises(InvalidRequest):
        loaded(cache, "night")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nigth", "loras: there is no LoRA `nigth`; did you mean `night`?"),
        ("notes", "loras: there is no LoRA `notes`"),
        ("../night", "loras: there is no LoRA `../night`"),
    ],
)
def test_an_unknown_name_is_refused_with_similar_names(folder: Path, name: str, message: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        loaded(LoraCache([LoraFolder(folder)], Loader(), limit_bytes=100), name)
    assert refused.value.message.startswith(message)


def test_without_a_folder_there_is_no_lora() -> None:
    with pytest.raises(InvalidRequest, match=r"there is no LoRA `night`$"):
        loaded(LoraCache([LoraFolder(None)], Loader(), limit_bytes=100), "night")


def test_a_job_receives_its_loras_and_a_job_that_names_an_unknown_one_fails(
    environment: Environment, folder: Path
) -> None:
    cache = LoraCache([LoraFolder(folder)], Loader(), limit_bytes=100)
    known = environment.submit(loras=[{"name": "night", "scale": 0.5}, {"name": "noon"}])
    unknown = environment.submit(loras=[{"name": "dusk"}])
    pipeline = StandInPipeline()
    environment.generate_due(pipeline=pipeline, loras=cache)
    assert environment.job(known).status == "succeeded"
    assert pipeline.inputs[0].loras.keys() == {"night", "noon"}
    failed = environment.job(unknown)
    assert (failed.status, failed.attempt, failed.error_code) == ("failed", 1, "invalid_request")
    assert "there is no LoRA `dusk`" in str(failed.error_message)


def test_a_registered_lora_is_available_until_it_is_removed(environment: Environment) -> None:
    environment.storage.put(DAWN_KEY, b"z" * 10, "application/octet-stream")
    with environment.database.write() as transaction:
        lora_library.register(transaction, lora_library.UploadedLora("dawn", "0a", "MIT", 10), DAWN_KEY)
    cache = LoraCache(
        [LoraFolder(None), RegisteredLoras(environment.database, environment.patient_storage())], Loader(), 100
    )
    assert loaded(cache, "dawn").content == b"z" * 10
    with environment.database.write() as transaction:
        assert lora_library.remove(transaction, "dawn") == DAWN_KEY
    with pytest.raises(InvalidRequest):
        loaded(cache, "dawn")


def test_a_lora_that_is_registered_again_with_another_strictness_is_loaded_again(environment: Environment) -> None:
    environment.storage.put(DAWN_KEY, b"z" * 10, "application/octet-stream")
    load = Loader()
    cache = LoraCache([RegisteredLoras(environment.database, environment.patient_storage())], load, 100)
    for strict in (True, False, True):
        with environment.database.write() as transaction:
            lora_library.register(transaction, lora_library.UploadedLora("dawn", "0a", "MIT", 10, strict), DAWN_KEY)
        assert loaded(cache, "dawn") is loaded(cache, "dawn")
        with environment.database.write() as transaction:
            lora_library.remove(transaction, "dawn")
    assert load.strict == [True, False, True]


def test_the_files_of_a_folder_are_strict(folder: Path) -> None:
    load = Loader()
    loaded(LoraCache([LoraFolder(folder)], load, limit_bytes=100), "night")
    assert load.strict == [True]


def test_an_unreadable_file_fails_its_job_and_not_the_worker(environment: Environment, folder: Path) -> None:
    (folder / "dusk.safetensors").mkdir()
    (folder / "missing.safetensors").symlink_to(folder / "nowhere")
    unreadable, missing = environment.submit(loras=[{"name": "dusk"}]), environment.submit(loras=[{"name": "missing"}])
    environment.generate_due(loras=LoraCache([LoraFolder(folder)], Loader(), limit_bytes=100))
    assert not environment.broken.is_set()
    for job_id, message in ((unreadable, "`dusk.safetensors` cannot be read"), (missing, "there is no LoRA `missing`")):
        job = environment.job(job_id)
        assert (job.status, job.attempt, job.error_code) == ("failed", 1, "invalid_request")
        assert message in str(job.error_message)


def test_a_job_whose_registered_file_is_missing_is_retried_and_then_fails_with_its_name(
    environment: Environment,
) -> None:
    with environment.database.write() as transaction:
        lora_library.register(transaction, lora_library.UploadedLora("dawn", "0a", "MIT", 10), DAWN_KEY)
    job_id = environment.submit(loras=[{"name": "dawn"}])
    library = RegisteredLoras(environment.database, environment.patient_storage())
    environment.generate_due(loras=LoraCache([library], Loader(), limit_bytes=100))
    job = environment.job(job_id)
    assert (job.status, job.attempt, job.error_code) == ("failed", 3, "input_unavailable")
    with pytest.raises(InputUnavailable, match="loras: the file of `dawn` is not in storage"):
        loaded(LoraCache([library], Loader(), limit_bytes=100), "dawn")

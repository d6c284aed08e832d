"""Storage in a directory that the API serves through signed links."""

import resource
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from tests.integration.installation import Server
from tests.waiting import wait_until
from zcore.errors import ConfigurationError, InvalidLink, NotFound, StorageError
from zcore.storage import DirectoryStorage

KEY = "jobs/0192/1-0.png"
NAME = "0192-0.png"
IMAGE = b"\x89PNG" + bytes(10_000)


def test_a_link_returns_the_object_without_an_api_key(served: DirectoryStorage) -> None:
    served.put(KEY, IMAGE, "image/png")
    answer = httpx.get(served.link(KEY, NAME).url)
    assert (answer.status_code, answer.content, answer.headers["content-type"]) == (200, IMAGE, "image/png")
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("suffix", ["png", "jpeg", "webp", "avif"])
def test_an_image_is_served_with_its_content_type(served: DirectoryStorage, suffix: str) -> None:
    served.put(f"jobs/0192/1-0.{suffix}", IMAGE, f"image/{suffix}")
    answer = httpx.get(served.link(f"jobs/0192/1-0.{suffix}", NAME).url)
    assert answer.headers["content-type"] == f"image/{suffix}"


def test_a_link_gives_access_to_one_object_only(served: DirectoryStorage) -> None:
    served.put("jobs/other/1-0.png", IMAGE, "image/png")
    answer = httpx.get(served.link(KEY, NAME).url.replace("0192", "other"))
    assert (answer.status_code, answer.json()["code"]) == (403, "invalid_link")


def test_the_expiry_of_a_link_cannot_be_changed(served: DirectoryStorage) -> None:
    served.put(KEY, IMAGE, "image/png")
    url = served.link(KEY, NAME).url
    expires = parse_qs(urlsplit(url).query)["expires"][0]
    assert httpx.get(url.replace(expires, str(int(expires) + 1))).status_code == 403


def test_a_link_expires(server: Server, served: DirectoryStorage) -> None:
    served.put(KEY, IMAGE, "image/png")
    short = DirectoryStorage(server.running.log.parent / "storage", server.url, "a key of this test", link_expiry_s=1)
    url = short.link(KEY, NAME).url
    wait_until(lambda: httpx.get(url).status_code == 403, timeout_s=10, every_s=0.2)
    assert "has expired" in httpx.get(url).json()["detail"]


def test_a_link_of_another_installation_is_refused(server: Server) -> None:
    foreign = DirectoryStorage(Path("unused"), server.url, "another key", link_expiry_s=60)
    assert httpx.get(foreign.link(KEY, NAME).url).status_code == 403


def test_a_link_to_a_purged_image_is_not_found(served: DirectoryStorage) -> None:
    answer = httpx.get(served.link("jobs/gone/1-0.png", NAME).url)
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


def test_no_path_leaves_the_directory(server: Server) -> None:
    for path in ("../keys/link", "%2e%2e/keys/link", "..%2fkeys%2flink", "jobs/%2e%2e/%2e%2e/keys/link"):
        answer = httpx.get(f"{server.url}/files/{path}?expires=9999999999&disposition=inline&signature=x")
        assert answer.status_code in (403, 404), path


def test_even_a_valid_signature_does_not_lead_out_of_the_directory(directory: DirectoryStorage) -> None:
    """The signing key alone gives no access to other files."""
    signature = directory._signature("../keys/link", 9_999_999_999, "inline")
    with pytest.raises(NotFound):
        directory.open_link("../keys/link", 9_999_999_999, "inline", signature)
    with pytest.raises(InvalidLink):
        directory.open_link(KEY, 9_999_999_999, "inline", signature)


def test_an_interrupted_put_stores_nothing(directory: DirectoryStorage, tmp_path: Path) -> None:
    directory.put("jobs/0192/1-1.png", IMAGE, "image/png")
    with files_of_at_most(4096), pytest.raises(StorageError, match="File too large"):
        directory.put(KEY, bytes(100_000), "image/png")
    assert [path.name for path in (tmp_path / "storage" / "jobs" / "0192").iterdir()] == ["1-1.png"]


def test_an_interrupted_put_preserves_the_existing_object(directory: DirectoryStorage) -> None:
    directory.put(KEY, IMAGE, "image/png")
    with files_of_at_most(4096), pytest.raises(StorageError):
        directory.put(KEY, bytes(100_000), "image/png")
    assert directory.get(KEY) == IMAGE


def test_the_folder_of_a_job_is_removed_with_its_last_object(directory: DirectoryStorage, tmp_path: Path) -> None:
    keys = [f"jobs/0192/1-{index}.png" for index in range(2)]
    for key in keys:
        directory.put(key, IMAGE, "image/png")
    directory.delete(keys[:1])
    assert (tmp_path / "storage" / "jobs" / "0192").is_dir()
    directory.delete(keys[1:])
    assert not (tmp_path / "storage" / "jobs" / "0192").exists()


def test_a_file_instead_of_a_folder_is_a_storage_error(directory: DirectoryStorage, tmp_path: Path) -> None:
    (tmp_path / "storage" / "jobs").write_bytes(b"in the way")
    with pytest.raises(StorageError, match=KEY):
        directory.put(KEY, IMAGE, "image/png")


def test_a_directory_that_cannot_be_created_is_refused_with_its_setting(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    storage = DirectoryStorage(tmp_path / "file" / "storage", "http://127.0.0.1:8000", "key", link_expiry_s=60)
    with pytest.raises(ConfigurationError, match=r"data_dir: .* cannot be created"):
        storage.prepare()


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Simulate a full disk: a write beyond `size` bytes of a file fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_puts_and_deletes_in_one_folder_may_run_concurrently(tmp_path: Path) -> None:
    store = DirectoryStorage(tmp_path, "http://images.example", "a key", 60)

    def put_and_delete(name: str) -> None:
        for _ in range(1000):
            store.put(f"inputs/anna/{name}", IMAGE, "image/png")
            store.delete([f"inputs/anna/{name}"])

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(put_and_delete, ["1", "2", "3"]))

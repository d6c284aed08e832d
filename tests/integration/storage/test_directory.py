"""Pictures in a folder that the API serves by signed links."""

import resource
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from tests.integration.installation import Installation, Server
from tests.waiting import wait_until
from zcore.errors import ConfigurationError, InvalidLink, NotFound, StorageError
from zcore.storage import DirectoryStorage

KEY = "jobs/0192/1-0.png"
PICTURE = b"\x89PNG" + bytes(10_000)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An API with pictures in its folder."""
    installation = Installation(tmp_path_factory.mktemp("served"), {"storage.link_key": "a key of this test"})
    with installation.serving() as started:
        yield started


@pytest.fixture
def served(server: Server) -> DirectoryStorage:
    """The server's own folder."""
    return DirectoryStorage(server.running.log.parent / "storage", server.url, "a key of this test", link_expiry_s=60)


def test_a_link_gives_the_picture_without_a_key(served: DirectoryStorage) -> None:
    served.put(KEY, PICTURE, "image/png")
    answer = httpx.get(served.link(KEY).url)
    assert (answer.status_code, answer.content, answer.headers["content-type"]) == (200, PICTURE, "image/png")
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("ending", ["png", "jpeg", "webp", "avif"])
def test_a_picture_is_served_as_what_it_is(served: DirectoryStorage, ending: str) -> None:
    served.put(f"jobs/0192/1-0.{ending}", PICTURE, f"image/{ending}")
    answer = httpx.get(served.link(f"jobs/0192/1-0.{ending}").url)
    assert answer.headers["content-type"] == f"image/{ending}"


def test_a_link_of_one_picture_does_not_open_another(served: DirectoryStorage) -> None:
    served.put("jobs/other/1-0.png", PICTURE, "image/png")
    answer = httpx.get(served.link(KEY).url.replace("0192", "other"))
    assert (answer.status_code, answer.json()["code"]) == (403, "invalid_link")


def test_a_link_cannot_be_made_to_last_longer(served: DirectoryStorage) -> None:
    served.put(KEY, PICTURE, "image/png")
    url = served.link(KEY).url
    expires = parse_qs(urlsplit(url).query)["expires"][0]
    assert httpx.get(url.replace(expires, str(int(expires) + 1))).status_code == 403


def test_a_link_ends(server: Server, served: DirectoryStorage) -> None:
    served.put(KEY, PICTURE, "image/png")
    short = DirectoryStorage(server.running.log.parent / "storage", server.url, "a key of this test", link_expiry_s=1)
    url = short.link(KEY).url
    wait_until(lambda: httpx.get(url).status_code == 403, timeout_s=10, every_s=0.2)
    assert "has expired" in httpx.get(url).json()["detail"]


def test_a_link_of_another_installation_is_refused(server: Server) -> None:
    foreign = DirectoryStorage(Path("unused"), server.url, "another key", link_expiry_s=60)
    assert httpx.get(foreign.link(KEY).url).status_code == 403


def test_a_link_to_a_purged_picture_says_that_there_is_none(served: DirectoryStorage) -> None:
    answer = httpx.get(served.link("jobs/gone/1-0.png").url)
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


def test_no_path_leaves_the_folder(server: Server) -> None:
    for path in ("../keys/link", "%2e%2e/keys/link", "..%2fkeys%2flink", "jobs/%2e%2e/%2e%2e/keys/link"):
        answer = httpx.get(f"{server.url}/files/{path}?expires=9999999999&signature=x")
        assert answer.status_code in (403, 404), path


def test_not_even_a_signature_leads_out_of_the_folder(directory: DirectoryStorage) -> None:
    """Even who had the signing key could not read other files by it."""
    signature = directory._signature("../keys/link", 9_999_999_999)
    with pytest.raises(NotFound):
        directory.open_link("../keys/link", 9_999_999_999, signature)
    with pytest.raises(InvalidLink):
        directory.open_link(KEY, 9_999_999_999, signature)


def test_a_put_that_fails_half_way_leaves_nothing(directory: DirectoryStorage, tmp_path: Path) -> None:
    directory.put("jobs/0192/1-1.png", PICTURE, "image/png")
    with files_of_at_most(4096), pytest.raises(StorageError, match="File too large"):
        directory.put(KEY, bytes(100_000), "image/png")
    assert [path.name for path in (tmp_path / "storage" / "jobs" / "0192").iterdir()] == ["1-1.png"]


def test_a_put_that_fails_half_way_leaves_the_earlier_picture(directory: DirectoryStorage) -> None:
    directory.put(KEY, PICTURE, "image/png")
    with files_of_at_most(4096), pytest.raises(StorageError):
        directory.put(KEY, bytes(100_000), "image/png")
    assert directory.get(KEY) == PICTURE


def test_the_folder_of_a_job_goes_with_its_last_picture(directory: DirectoryStorage, tmp_path: Path) -> None:
    keys = [f"jobs/0192/1-{index}.png" for index in range(2)]
    for key in keys:
        directory.put(key, PICTURE, "image/png")
    directory.delete(keys[:1])
    assert (tmp_path / "storage" / "jobs" / "0192").is_dir()
    directory.delete(keys[1:])
    assert not (tmp_path / "storage" / "jobs" / "0192").exists()


def test_a_file_in_the_way_is_a_storage_error(directory: DirectoryStorage, tmp_path: Path) -> None:
    (tmp_path / "storage" / "jobs").write_bytes(b"in the way")
    with pytest.raises(StorageError, match=KEY):
        directory.put(KEY, PICTURE, "image/png")


def test_a_folder_that_cannot_be_made_is_named_with_its_setting(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    storage = DirectoryStorage(tmp_path / "file" / "storage", "http://127.0.0.1:8000", "key", link_expiry_s=60)
    with pytest.raises(ConfigurationError, match=r"data_dir: .* cannot be made"):
        storage.prepare()


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk that is full, as far as this process can tell: a write beyond `size` bytes of a file fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_folder_that_goes_with_its_last_object_takes_the_next_one_all_the_same(tmp_path: Path) -> None:
    store = DirectoryStorage(tmp_path, "http://pictures.example", "a key", 60)

    def put_and_delete(name: str) -> None:
        for _ in range(1000):
            store.put(f"inputs/anna/{name}", PICTURE, "image/png")
            store.delete([f"inputs/anna/{name}"])

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(put_and_delete, ["1", "2", "3"]))

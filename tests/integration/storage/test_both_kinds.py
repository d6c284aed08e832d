"""Behaviour that a directory and every kind of bucket share."""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from zcore import storage as storage_module
from zcore.errors import NotFound
from zcore.storage import DirectoryStorage, Page, Storage

KEY = "jobs/0192/1-0.png"
IMAGE = bytes(range(256)) * 400
INVALID_KEYS = ["../secret", "jobs/../../secret", "/etc/passwd", "jobs//x", "jobs/./x", "jobs/", ".", ""]


def test_get_returns_the_object_that_was_put(storage: Storage) -> None:
    storage.put(KEY, IMAGE, "image/png")
    assert storage.get(KEY) == IMAGE


def test_a_put_replaces_an_existing_object(storage: Storage) -> None:
    storage.put(KEY, IMAGE, "image/png")
    storage.put(KEY, b"new", "image/png")
    assert storage.get(KEY) == b"new"


def test_an_empty_object_is_stored(storage: Storage) -> None:
    storage.put(KEY, b"", "image/png")
    assert storage.get(KEY) == b""


def test_getting_a_missing_object_raises_not_found(storage: Storage) -> None:
    with pytest.raises(NotFound, match=KEY):
        storage.get(KEY)


def test_delete_removes_many_keys_and_no_others(storage: Storage) -> None:
    keys = [f"jobs/a/1-{index}.png" for index in range(3)]
    for key in [*keys, "jobs/a/1-3.png"]:
        storage.put(key, IMAGE, "image/png")
    storage.delete(keys)
    for key in keys:
        with pytest.raises(NotFound):
            storage.get(key)
    assert storage.get("jobs/a/1-3.png") == IMAGE


def test_deleting_missing_objects_is_not_an_error(storage: Storage) -> None:
    storage.delete([KEY, "jobs/other/1-0.png"])
    storage.delete([])


@pytest.mark.parametrize("key", INVALID_KEYS)
def test_a_key_that_is_not_normalized_is_refused_by_every_method(storage: Storage, key: str) -> None:
    for method in (
        lambda: storage.put(key, IMAGE, "image/png"),
        lambda: storage.get(key),
        lambda: storage.exists(key),
        lambda: storage.link(key, "x.png"),
        lambda: storage.delete([key]),
    ):
        with pytest.raises(NotFound, match="is not a valid object key"):
            method()


def test_a_link_has_its_expiry_time(storage: Storage) -> None:
    before = datetime.now(UTC)
    remaining_s = (storage.link(KEY, "x.png").expires_at - before).total_seconds()
    assert 60 <= remaining_s <= 75, "rounded up to a window of a quarter of the time"


def test_preparing_twice_preserves_the_objects(storage: Storage) -> None:
    storage.put(KEY, IMAGE, "image/png")
    storage.prepare()
    assert storage.get(KEY) == IMAGE


@pytest.mark.parametrize("kind", ["directory", "bucket"])
def test_objects_are_listed_by_prefix_a_page_at_a_time(request: pytest.FixtureRequest, kind: str) -> None:
    listing: Storage = request.getfixturevalue(kind)
    keys = [f"jobs/{job}/{attempt}-0.png" for job in ("a", "b", "c") for attempt in (1, 2)]
    for key in [*keys, "inputs/x", "jobs-of-others/y"]:
        listing.put(key, IMAGE, "image/png")
    pages: list[list[str]] = [[]]
    while pages[-1] or len(pages) == 1:
        last = pages[-1][-1] if pages[-1] else ""
        found = listing.list_objects("jobs/", last, 4)
        assert found is not None
        assert all(abs((datetime.now(UTC) - one.modified_at).total_seconds()) < 600 for one in found.objects)
        assert found.next_after == (keys[3] if len(found.objects) == 4 else None)
        pages.append([one.key for one in found.objects])
    assert pages == [[], keys[:4], keys[4:], []]
    assert listing.list_objects("loras/", "", 4) == Page([], None)


def test_a_page_that_the_store_cuts_short_is_not_the_last(ignorant: Storage) -> None:
    keys = [f"jobs/a/1-{index}.png" for index in range(5)]
    for key in keys:
        ignorant.put(key, IMAGE, "image/png")
    listed: list[str] = []
    after: str | None = ""
    while after is not None:
        page = ignorant.list_objects("jobs/", after, 500)
        assert page is not None
        listed += [one.key for one in page.objects]
        after = page.next_after
    assert listed == keys


def test_an_object_exists_or_does_not(storage: Storage) -> None:
    assert not storage.exists(KEY)
    storage.put(KEY, IMAGE, "image/png")
    assert storage.exists(KEY)


@pytest.mark.parametrize("at_once", [1, 3, 10_000])
def test_the_order_of_listed_files_is_that_of_their_keys(
    directory: DirectoryStorage, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "KEYS_READ_AT_ONCE", at_once)
    keys = sorted(["a/b-c/1", "a/b/1", "a/b/2", "a/b.c", "a/b/c/d", "a/z", "ab/1", "b", "a/b0"])
    for key in keys:
        directory.put(key, IMAGE, "image/png")
    for after in ("", *keys):
        page = directory.list_objects("", after, 100)
        assert [one.key for one in page.objects] == [key for key in keys if key > after]


def test_the_pages_of_a_folder_read_it_once(directory: DirectoryStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    for job in range(40):
        directory.put(f"jobs/{job:02}/1-0.png", IMAGE, "image/png")
    read: list[str] = []
    scandir = os.scandir

    def counted(folder: Path) -> Any:
        read.append(Path(folder).name)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", counted)
    listed, after = 0, ""
    while page := directory.list_objects("jobs/", after, 4):
        listed += len(page.objects)
        if page.next_after is None:
            break
        after = page.next_after
    assert listed == 40
    assert read.count("jobs") <= 2, "once to find its entries, once to find that there are no more"


def test_a_bucket_that_may_not_be_listed_says_so(strict: Storage) -> None:
    assert strict.list_objects("jobs/", "", 4) is None


def test_what_an_interrupted_put_left_is_listed_as_a_draft(directory: DirectoryStorage, tmp_path: Path) -> None:
    directory.put("jobs/a/1-0.png", IMAGE, "image/png")
    draft = tmp_path / "storage" / "jobs" / "a" / f".1-1.png.{'0a' * 8}"
    draft.write_bytes(IMAGE[:10])
    found = {one.key: one.is_draft for one in directory.list_objects("jobs/", "", 10).objects}
    assert found == {"jobs/a/1-0.png": False, f"jobs/a/{draft.name}": True}
    directory.delete([f"jobs/a/{draft.name}"])
    assert not draft.exists()

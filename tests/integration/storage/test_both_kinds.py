"""What a bucket and a directory have in common: everything that the product asks of them."""

from datetime import UTC, datetime

import pytest

from zcore.errors import NotFound
from zcore.storage import Storage

KEY = "jobs/0192/1-0.png"
PICTURE = bytes(range(256)) * 400
ODD_KEYS = ["../secret", "jobs/../../secret", "/etc/passwd", "jobs//x", "jobs/./x", "jobs/", ".", ""]


def test_what_was_put_is_what_is_got(storage: Storage) -> None:
    storage.put(KEY, PICTURE, "image/png")
    assert storage.get(KEY) == PICTURE


def test_a_put_replaces_what_was_there(storage: Storage) -> None:
    storage.put(KEY, PICTURE, "image/png")
    storage.put(KEY, b"new", "image/png")
    assert storage.get(KEY) == b"new"


def test_an_empty_object_is_an_object(storage: Storage) -> None:
    storage.put(KEY, b"", "image/png")
    assert storage.get(KEY) == b""


def test_getting_what_is_not_there_says_so(storage: Storage) -> None:
    with pytest.raises(NotFound, match=KEY):
        storage.get(KEY)


def test_delete_takes_many_and_leaves_the_others(storage: Storage) -> None:
    keys = [f"jobs/a/1-{index}.png" for index in range(3)]
    for key in [*keys, "jobs/a/1-3.png"]:
        storage.put(key, PICTURE, "image/png")
    storage.delete(keys)
    for key in keys:
        with pytest.raises(NotFound):
            storage.get(key)
    assert storage.get("jobs/a/1-3.png") == PICTURE


def test_deleting_what_is_not_there_is_no_error(storage: Storage) -> None:
    storage.delete([KEY, "jobs/other/1-0.png"])
    storage.delete([])


@pytest.mark.parametrize("key", ODD_KEYS)
def test_a_key_that_leaves_its_place_is_refused_by_every_verb(storage: Storage, key: str) -> None:
    for verb in (
        lambda: storage.put(key, PICTURE, "image/png"),
        lambda: storage.get(key),
        lambda: storage.link(key),
        lambda: storage.delete([key]),
    ):
        with pytest.raises(NotFound, match="names no object"):
            verb()


def test_a_link_says_when_it_ends(storage: Storage) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    left_s = (storage.link(KEY).expires_at - before).total_seconds()
    assert 60 <= left_s <= 62


def test_preparing_twice_is_no_error_and_keeps_what_is_there(storage: Storage) -> None:
    storage.put(KEY, PICTURE, "image/png")
    storage.prepare()
    assert storage.get(KEY) == PICTURE

"""What a link answers, to real clients: the same from the API's folder as from an S3 server."""

import subprocess
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime, parsedate_to_datetime
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zcore.storage import BucketStorage, DirectoryStorage, Link, link_period

KEY = "jobs/0192/1-0.png"
NAME = "0192-0.png"
IMAGE = bytes(range(256)) * 4000


@pytest.fixture(params=["served", "bucket"])
def linked(request: pytest.FixtureRequest) -> Link:
    """A link to `IMAGE` in a folder that the API serves, or in a bucket."""
    return _link(request.getfixturevalue(request.param))


def _link(storage: BucketStorage | DirectoryStorage) -> Link:
    storage.put(KEY, IMAGE, "image/png")
    return storage.link(KEY, NAME)


def curl(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["curl", "--silent", "--show-error", *arguments], capture_output=True, text=True)


def test_a_browser_shows_the_link_and_saves_the_download_link_under_the_jobs_name(linked: Link) -> None:
    answers = [httpx.get(url) for url in (linked.url, linked.download_url)]
    assert [answer.content for answer in answers] == [IMAGE] * 2
    assert [answer.headers["content-disposition"] for answer in answers] == [
        'inline; filename="0192-0.png"',
        'attachment; filename="0192-0.png"',
    ]


def test_curl_saves_a_link_under_the_jobs_name(linked: Link, tmp_path: Path) -> None:
    assert curl("--remote-name", "--remote-header-name", "--output-dir", str(tmp_path), linked.url).returncode == 0
    assert (tmp_path / NAME).read_bytes() == IMAGE


def test_caches_keep_an_image_no_longer_than_its_link_is_valid(linked: Link) -> None:
    answer = httpx.get(linked.url)
    policy = answer.headers["cache-control"]
    assert policy.startswith("private")
    if "expires" in answer.headers:
        fresh_until = parsedate_to_datetime(answer.headers["expires"])
    else:
        fresh_until = datetime.now(UTC) + timedelta(seconds=int(policy.partition("max-age=")[2]))
    assert linked.expires_at - timedelta(seconds=30) <= fresh_until <= linked.expires_at + timedelta(seconds=1)


@pytest.mark.parametrize("begun", [0, 1, 300_000, len(IMAGE) - 1])
def test_curl_resumes_a_download(linked: Link, tmp_path: Path, begun: int) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(IMAGE[:begun])
    resumed = curl("--continue-at", "-", "--output", str(path), "--write-out", "%{http_code}", linked.url)
    assert (resumed.returncode, resumed.stdout) == (0, "206" if begun else "200")
    assert path.read_bytes() == IMAGE


ALL = slice(None)
NONE = slice(0)
CONDITIONS: list[tuple[dict[str, str], int, slice]] = [
    ({"if-none-match": "{etag}"}, 304, NONE),
    ({"if-none-match": '"another", {etag}'}, 304, NONE),
    ({"if-none-match": "*"}, 304, NONE),
    ({"if-none-match": '"another"'}, 200, ALL),
    ({"if-modified-since": "{modified}"}, 304, NONE),
    ({"if-modified-since": "{later}"}, 304, NONE),
    ({"if-modified-since": "{earlier}"}, 200, ALL),
    ({"if-none-match": '"another"', "if-modified-since": "{modified}"}, 200, ALL),
    ({"if-match": "{etag}"}, 200, ALL),
    ({"if-match": '"another"'}, 412, NONE),
    ({"if-unmodified-since": "{earlier}"}, 412, NONE),
    ({"if-unmodified-since": "{modified}"}, 200, ALL),
    ({"range": "bytes=0-0"}, 206, slice(1)),
    ({"range": "bytes=100-299999"}, 206, slice(100, 300_000)),
    ({"range": "bytes=1023999-"}, 206, slice(1_023_999, None)),
    ({"range": "bytes=1000000-99999999"}, 206, slice(1_000_000, None)),
    ({"range": "bytes=-7"}, 206, slice(-7, None)),
    ({"range": "bytes=-99999999"}, 206, ALL),
    ({"range": "bytes=1024000-"}, 416, NONE),
    ({"range": "bytes=99999999-100000000"}, 416, NONE),
    ({"range": "bytes=5-9", "if-range": "{etag}"}, 206, slice(5, 10)),
    ({"range": "bytes=5-9", "if-none-match": "{etag}"}, 304, NONE),
]
"""Headers of a request, and the status and the part of the image that it is answered with."""

CONDITIONS_OF_THE_API: list[tuple[dict[str, str], int, slice]] = [
    ({"if-none-match": "W/{etag}"}, 304, NONE),
    ({"if-match": "W/{etag}"}, 412, NONE),
    ({"if-modified-since": "yesterday"}, 200, ALL),
    ({"if-modified-since": "Sunday, 06-Nov-94 08:49:37 GMT"}, 200, ALL),
    ({"if-unmodified-since": "Sun Nov  6 08:49:37 1994"}, 412, NONE),
    ({"range": "bytes=1000000-99999999999999999999"}, 206, slice(1_000_000, None)),
    ({"range": f"bytes={'9' * 5000}-"}, 416, NONE),
    ({"range": "bytes=9-5"}, 200, ALL),
    ({"range": "bytes=-"}, 200, ALL),
    ({"range": "pages=1-2"}, 200, ALL),
    ({"range": "bytes=0-1,5-9"}, 200, ALL),
    ({"range": "bytes=-0"}, 416, NONE),
    ({"range": "bytes=5-9", "if-range": '"another"'}, 200, ALL),
    ({"range": "bytes=5-9", "if-range": "W/{etag}"}, 200, ALL),
    ({"range": "bytes=5-9", "if-range": "{earlier}"}, 200, ALL),
]
"""Those which the S3 server of the tests treats differently than RFC 9110, or differently than we chose to."""


def test_preconditions_and_ranges_are_evaluated(linked: Link) -> None:
    conditions = [*CONDITIONS, *(CONDITIONS_OF_THE_API if "/files/" in linked.url else [])]
    with httpx.Client() as client:
        whole = client.get(linked.url).headers
        modified = parsedate_to_datetime(whole["last-modified"])
        known = {
            "etag": whole["etag"],
            "modified": whole["last-modified"],
            "later": format_datetime(modified + timedelta(days=1), usegmt=True),
            "earlier": format_datetime(modified - timedelta(days=1), usegmt=True),
        }
        for headers, status, part in conditions:
            answer = client.get(linked.url, headers={name: value.format(**known) for name, value in headers.items()})
            assert answer.status_code == status, headers
            if status < 400:
                assert answer.content == IMAGE[part], headers
            if status == 206:
                start, stop, _ = part.indices(len(IMAGE))
                assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(IMAGE)}"


def test_a_head_request_ignores_ranges_and_has_no_body(served: DirectoryStorage) -> None:
    answer = httpx.head(_link(served).url, headers={"range": "bytes=5-9"})
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-length"] == str(len(IMAGE))


def test_a_replaced_file_has_another_etag_and_a_resumed_download_begins_again(served: DirectoryStorage) -> None:
    link = _link(served)
    etag = httpx.get(link.url).headers["etag"]
    assert not etag.startswith("W/")
    served.put(KEY, IMAGE[::-1], "image/png")
    answer = httpx.get(link.url, headers={"range": "bytes=5-", "if-range": etag})
    assert (answer.status_code, answer.content) == (200, IMAGE[::-1])
    assert answer.headers["etag"] != etag


@given(st.integers(1, 604_800), st.integers(0, 4_000_000_000))
def test_links_last_as_long_as_asked_for_and_are_the_same_within_a_window(link_expiry_s: int, at_s: int) -> None:
    now = datetime.fromtimestamp(at_s, UTC)
    period = link_period(link_expiry_s, now)
    window_s = max(1, min(900, link_expiry_s // 4))
    remaining_s = (period.expires_at - now).total_seconds()
    assert min(link_expiry_s, 604_800 - window_s) <= remaining_s <= link_expiry_s + window_s
    assert period.expires_at - period.signed_at == timedelta(seconds=period.lifetime_s) <= timedelta(days=7)
    assert link_period(link_expiry_s, period.signed_at) == period
    assert link_period(link_expiry_s, period.signed_at + timedelta(seconds=window_s - 1)) == period
    assert link_period(link_expiry_s, period.signed_at + timedelta(seconds=window_s)) != period


def test_a_link_is_signed_for_its_whole_window(directory: DirectoryStorage, bucket: BucketStorage) -> None:
    """With a validity of 60 s, a window has 15 s."""
    (expires,) = parse_qs(urlsplit(directory.link(KEY, NAME).url).query)["expires"]
    assert int(expires) % 15 == 0
    query = parse_qs(urlsplit(bucket.link(KEY, NAME).url).query)
    assert datetime.strptime(query["X-Amz-Date"][0], "%Y%m%dT%H%M%SZ").second % 15 == 0

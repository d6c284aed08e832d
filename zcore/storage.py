"""Object storage: an S3-compatible bucket, or a directory that the API serves through signed, expiring links.

Both behave alike: a put is atomic, deleting a missing object is not an error, and a link works without an API key until
it expires. Does not know jobs, and does not retry beyond what the S3 client does.
"""

import base64
import contextlib
import hashlib
import heapq
import hmac
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import format_datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Protocol, cast
from urllib.parse import quote, urlencode, urlsplit

import boto3
from botocore import UNSIGNED
from botocore.auth import SIGV4_TIMESTAMP, S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials
from botocore.exceptions import BotoCoreError, ClientError

from zcore.api_paths import FILES_PATH
from zcore.errors import ConfigurationError, InvalidLink, NotFound, StorageError
from zcore.settings import Settings, StorageSettings, is_loopback
from zcore.storage_keys import PROBE_KEY

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

OPEN_ATTEMPTS = 20
MAX_CONCURRENT_DELETES = 8
TRIES = 2
CONNECT_TIMEOUT_S = 3
READ_TIMEOUT_S = 10
KEYS_READ_AT_ONCE = 10_000
LONGEST_LINK_WINDOW_S = 900
LONGEST_LINK_S = 604_800
"""A week: the longest time for which S3 accepts a presigned URL."""
DRAFT_NAME = re.compile(r"\..+\.[0-9a-f]{16}")
"""Name of a file that is still being written: a dot, the name that it will get, and a random suffix."""
CREDENTIAL_CODES = frozenset(
    ["InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidSecurity", "InvalidToken", "ExpiredToken"]
)
"""S3 error codes that mean wrong credentials, in contrast to a missing permission."""


@dataclass(frozen=True, slots=True)
class Link:
    """Presigned URLs of an object, valid without an API key until `expires_at`.

    A browser shows the object at `url`, and saves it as a file when it is sent to `download_url`.
    """

    url: str
    download_url: str
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class LinkPeriod:
    """The time in which a link is valid; `expires_at` is `lifetime_s` after `signed_at`."""

    signed_at: datetime
    lifetime_s: int
    expires_at: datetime


def link_period(link_expiry_s: int, now: datetime) -> LinkPeriod:
    """Return the period of a link made `now` that has to be valid for at least `link_expiry_s`, in whole seconds.

    All links of a time window have the same period. The same object therefore has the same link, and caches know it
    again. The window is a quarter of `link_expiry_s`, at most a quarter of an hour.
    """
    window_s = max(1, min(LONGEST_LINK_WINDOW_S, link_expiry_s // 4))
    signed_at = int(now.timestamp()) // window_s * window_s
    lifetime_s = min(link_expiry_s + window_s, LONGEST_LINK_S)
    return LinkPeriod(
        datetime.fromtimestamp(signed_at, UTC), lifetime_s, datetime.fromtimestamp(signed_at + lifetime_s, UTC)
    )


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object in a listing; `modified_at` is the time at which it was stored.

    A draft is what a put left that did not end; only listing and deletion know it.
    """

    key: str
    modified_at: datetime
    is_draft: bool = False


@dataclass(frozen=True, slots=True)
class Page:
    """Some objects of a listing. The next page comes after the key `next_after`; None if this page is the last."""

    objects: Sequence[StoredObject]
    next_after: str | None


class Storage(Protocol):
    """Object store. Every method raises `StorageError` if the store does not answer."""

    def prepare(self) -> None:
        """Create the bucket or directory if it does not exist."""
        ...

    def put(self, key: str, content: bytes, content_type: str) -> None:
        """Store an object; an existing one with the same key is replaced.

        Returns once the store holds the object completely. Raises `StorageError` if it holds something else.
        """
        ...

    def get(self, key: str) -> bytes:
        """Return the object's bytes. Raises `NotFound`."""
        ...

    def exists(self, key: str) -> bool:
        """Return whether there is such an object, without reading it."""
        ...

    def link(self, key: str, name: str) -> Link:
        """Return a link under which browsers save the object as the file `name` (ASCII, without quotes).

        Does not check whether the object exists.
        """
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; missing ones are ignored."""
        ...

    def list_objects(self, prefix: str, after: str, limit: int) -> Page | None:
        """Return up to `limit` objects whose keys begin with `prefix` and come after `after`, in the order of keys.

        A store may return fewer although more follow. Returns None if the store does not list its objects, or not for
        these credentials.
        """
        ...


def open_storage(settings: Settings, link_key: str) -> Storage:
    """Return the configured store: a bucket if the settings name one, else a directory in `data_dir`."""
    if settings.storage.bucket:
        return BucketStorage(settings.storage)
    return DirectoryStorage(
        settings.data_path / "storage", settings.public_url, link_key, settings.storage.link_expiry_s
    )


class DirectoryStorage:
    """Objects as files below one directory; links lead to the API, which checks them with `open_link`."""

    def __init__(self, root: Path, public_url: str, link_key: str, link_expiry_s: int) -> None:
        self._root = root
        self._public_url = public_url
        self._link_key = link_key.encode()
        self._link_expiry_s = link_expiry_s
        self._listed: dict[tuple[str, str], Iterator[StoredObject]] = {}

    def prepare(self) -> None:
        try:
            self._root.mkdir(parents=True, exist_ok=True)
        except OSError as fault:
            raise ConfigurationError(f"data_dir: {self._root} cannot be created: {fault.strerror}") from fault

    def put(self, key: str, content: bytes, content_type: str) -> None:
        path = self._path(key)
        draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            with _open_new(draft) as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        except OSError as fault:
            with contextlib.suppress(OSError):
                draft.unlink()
            raise StorageError(f"{key}: cannot be written: {fault.strerror}") from fault

    def get(self, key: str) -> bytes:
        try:
            return self._path(key).read_bytes()
        except FileNotFoundError as fault:
            raise NotFound(f"there is no object {key}") from fault
        except OSError as fault:
            raise StorageError(f"{key}: cannot be read: {fault.strerror}") from fault

    def exists(self, key: str) -> bool:
        try:
            self._path(key).stat()
        except FileNotFoundError:
            return False
        except OSError as fault:
            raise StorageError(f"{key}: cannot be read: {fault.strerror}") from fault
        return True

    def link(self, key: str, name: str) -> Link:
        expires_at = link_period(self._link_expiry_s, datetime.now(UTC)).expires_at
        expires = int(expires_at.timestamp())

        def signed(disposition: str) -> str:
            signature = self._signature(_checked(key), expires, disposition)
            query = urlencode({"expires": expires, "disposition": disposition, "signature": signature})
            return f"{self._public_url}{FILES_PATH}/{quote(key)}?{query}"

        return Link(signed(_disposition("inline", name)), signed(_disposition("attachment", name)), expires_at)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            path = self._path(key)
            try:
                path.unlink(missing_ok=True)
            except OSError as fault:
                raise StorageError(f"{key}: cannot be deleted: {fault.strerror}") from fault
            if path.parent != self._root:
                # A job's folder is removed with its last object.
                with contextlib.suppress(OSError):
                    path.parent.rmdir()

    def list_objects(self, prefix: str, after: str, limit: int) -> Page:
        # A page goes on where the last one ended, so that its folders are not read again.
        files = self._listed.pop((prefix, after), None) or _files(self._root, "", prefix, after)
        self._listed.clear()
        try:
            objects = list(islice(files, limit))
        except OSError as fault:
            raise StorageError(f"{self._root}: cannot be listed: {fault.strerror}") from fault
        if len(objects) < limit:
            return Page(objects, None)
        last = objects[-1].key
        self._listed[prefix, last] = files
        return Page(objects, last)

    def open_link(self, key: str, expires: int, disposition: str, signature: str) -> BinaryIO:
        """Open the linked file. Raises `InvalidLink` if altered or expired, `NotFound` if the object is gone."""
        if not hmac.compare_digest(self._signature(key, expires, disposition).encode(), signature.encode()):
            raise InvalidLink("the signature of the link is not valid")
        if expires < datetime.now(UTC).timestamp():
            raise InvalidLink("the link has expired; GET the job again for a new one")
        try:
            return self._path(key).open("rb")
        except (FileNotFoundError, IsADirectoryError) as fault:
            raise NotFound(f"there is no object {key}") from fault
        except OSError as fault:
            raise StorageError(f"{key}: cannot be read: {fault.strerror}") from fault

    def _signature(self, key: str, expires: int, disposition: str) -> str:
        return hmac.new(self._link_key, f"{key}\n{expires}\n{disposition}".encode(), hashlib.sha256).hexdigest()

    def _path(self, key: str) -> Path:
        return self._root / _checked(key)


class BucketStorage:
    """Objects in an S3-compatible bucket.

    Uses only what every such store offers, whatever its age: plain bodies instead of `aws-chunked` ones, Content-MD5
    instead of newer checksums, and one DELETE per object, because stores disagree on the checksum that a bulk deletion
    requires and some have none. Needs the rights to put, get and delete objects, and no other if the bucket exists;
    objects that belong to no row are found only with the right to list them.

    Links are presigned GET URLs of `public_endpoint_url` if set, else of `endpoint_url`.
    """

    def __init__(self, settings: StorageSettings) -> None:
        self._bucket = settings.bucket
        self._region = settings.region
        self._link_expiry_s = settings.link_expiry_s
        self._credentials = _credentials(settings)
        self._client = _client(settings, settings.endpoint_url, "s3v4")
        self._public_url = _bucket_url(settings)

    def prepare(self) -> None:
        try:
            # The answer distinguishes wrong credentials, a missing bucket and missing permissions. Asking for the
            # bucket itself does not, and takes a permission that nothing else needs.
            self._client.get_object(Bucket=self._bucket, Key=PROBE_KEY)
        except ClientError as fault:
            if _code(fault) in CREDENTIAL_CODES or _status(fault) == 401:
                raise ConfigurationError(
                    f"storage.access_key_id, secret_access_key: do not give access to bucket {self._bucket}: {fault}"
                ) from fault
            if _code(fault) == "NoSuchBucket":
                self._create_bucket()
            elif _status(fault) not in (403, 404):  # 403 without the right to list; either way there is no such object
                raise StorageError(f"bucket {self._bucket}: {fault}") from fault
        except BotoCoreError as fault:
            raise StorageError(f"bucket {self._bucket}: {fault}") from fault

    def put(self, key: str, content: bytes, content_type: str) -> None:
        md5 = hashlib.md5(content, usedforsecurity=False)
        with _ClientErrors(_checked(key)):
            answer = self._client.put_object(
                Bucket=self._bucket,
                Key=key,
                Body=content,
                ContentType=content_type,
                ContentMD5=base64.b64encode(md5.digest()).decode(),
            )
        # Most stores return the MD5 of what they stored. The ETag of an encrypted or divided object is something else.
        if answer.get("ETag", "").strip('"').lower() != md5.hexdigest():
            self._verify_size(key, len(content))

    def get(self, key: str) -> bytes:
        with _ClientErrors(_checked(key)):
            return self._client.get_object(Bucket=self._bucket, Key=key)["Body"].read()

    def exists(self, key: str) -> bool:
        checked = _checked(key)
        try:
            with _ClientErrors(checked):
                self._client.head_object(Bucket=self._bucket, Key=checked)
        except NotFound:
            return False
        return True

    def link(self, key: str, name: str) -> Link:
        period = link_period(self._link_expiry_s, datetime.now(UTC))

        def signed(disposition: str) -> str:
            response_headers = {
                "response-cache-control": "private",
                "response-content-disposition": disposition,
                # Not max-age, which would begin when the object is read and could end after the link.
                "response-expires": format_datetime(period.expires_at, usegmt=True),
            }
            request: Any = AWSRequest("GET", f"{self._public_url}/{quote(key)}", params=response_headers)
            _PeriodAuth(self._credentials, self._region, period).add_auth(request)
            return request.url

        with _ClientErrors(_checked(key)):
            return Link(
                signed(_disposition("inline", name)), signed(_disposition("attachment", name)), period.expires_at
            )

    def delete(self, keys: Iterable[str]) -> None:
        checked = [_checked(key) for key in keys]
        with ThreadPoolExecutor(MAX_CONCURRENT_DELETES, "storage-delete") as pool:
            list(pool.map(self._delete, checked))  # the first error cancels those that have not begun

    def list_objects(self, prefix: str, after: str, limit: int) -> Page | None:
        try:
            # The first version of this request, which every store has.
            answer = self._client.list_objects(Bucket=self._bucket, Prefix=prefix, Marker=after, MaxKeys=limit)
        except ClientError as fault:
            if _status(fault) in (403, 405, 501):
                return None
            raise StorageError(f"bucket {self._bucket}: {fault}") from fault
        except BotoCoreError as fault:
            raise StorageError(f"bucket {self._bucket}: {fault}") from fault
        contents: Any = answer.get("Contents", [])
        objects = [StoredObject(found["Key"], found["LastModified"]) for found in contents]
        last = answer.get("NextMarker") or (objects[-1].key if objects else None)
        return Page(objects, last if answer.get("IsTruncated", len(objects) == limit) else None)

    def _delete(self, key: str) -> None:
        with contextlib.suppress(NotFound), _ClientErrors(key):
            self._client.delete_object(Bucket=self._bucket, Key=key)

    def _verify_size(self, key: str, size: int) -> None:
        """Compare the size of a stored object; delete it and raise `StorageError` if it differs."""
        try:
            with _ClientErrors(key):
                stored = self._client.head_object(Bucket=self._bucket, Key=key)["ContentLength"]
        except NotFound as fault:
            raise StorageError(f"{key}: the store accepted the object but does not have it") from fault
        if stored != size:
            with contextlib.suppress(StorageError):
                self._delete(key)
            raise StorageError(f"{key}: the store corrupted the object: {size} bytes were sent, {stored} are stored")

    def _create_bucket(self) -> None:
        # boto3 types the region as one of AWS's; other stores use any name.
        options: Any = (
            {} if self._region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": self._region}}
        )
        try:
            self._client.create_bucket(Bucket=self._bucket, **options)
        except ClientError as fault:
            if _status(fault) in (401, 403):
                raise ConfigurationError(
                    f"storage.bucket: there is no bucket {self._bucket}, and storage.access_key_id may not create it; "
                    f"create it or correct the name: {fault}"
                ) from fault
            if _status(fault) != 409:  # another process has created it in the meantime
                raise StorageError(f"bucket {self._bucket}: {fault}") from fault
        except BotoCoreError as fault:
            raise StorageError(f"bucket {self._bucket}: {fault}") from fault


class _PeriodAuth(S3SigV4QueryAuth):
    """Signs a URL for a given period. Its base class always signs for a period that begins now."""

    def __init__(self, credentials: Any, region: str, period: LinkPeriod) -> None:
        super().__init__(credentials, "s3", region, expires=period.lifetime_s)
        self._timestamp = period.signed_at.strftime(SIGV4_TIMESTAMP)

    def _modify_request_before_signing(self, request: Any) -> None:
        request.context["timestamp"] = self._timestamp
        cast(Any, super())._modify_request_before_signing(request)


class _ClientErrors:
    """Context manager that converts the S3 client's exceptions into ours."""

    def __init__(self, key: str) -> None:
        self._key = key

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: type[BaseException] | None, fault: BaseException | None, _trace: object) -> None:
        if isinstance(fault, ClientError):
            if _status(fault) == 404 and _code(fault) != "NoSuchBucket":
                raise NotFound(f"there is no object {self._key}") from fault
            raise StorageError(f"{self._key}: {fault}") from fault
        if isinstance(fault, BotoCoreError):
            raise StorageError(f"{self._key}: {fault}") from fault


def _status(fault: ClientError) -> int:
    return int(fault.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _code(fault: ClientError) -> str:
    return fault.response.get("Error", {}).get("Code", "")


def _open_new(draft: Path) -> BinaryIO:
    """Open a new file; its folder is created again if a concurrent delete of its last object removes it."""
    for _ in range(OPEN_ATTEMPTS):
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            draft.parent.mkdir(parents=True, exist_ok=True)
            return draft.open("wb")
    return draft.open("wb")


def _files(folder: Path, folder_key: str, prefix: str, after: str) -> Iterator[StoredObject]:
    """Yield the files below a folder in the order of their keys, beginning after `after`."""
    done = ""
    while keys := _first_keys(folder, folder_key, prefix, after, done):
        for key in keys:
            path = folder / key.removeprefix(folder_key)
            if key.endswith("/"):
                yield from _files(path, key, prefix, after)
            else:
                with contextlib.suppress(FileNotFoundError):  # deleted since the folder was read
                    modified_at = datetime.fromtimestamp(path.stat().st_mtime, UTC)
                    yield StoredObject(key, modified_at, is_draft=DRAFT_NAME.fullmatch(path.name) is not None)
        done = keys[-1]


def _first_keys(folder: Path, folder_key: str, prefix: str, after: str, done: str) -> list[str]:
    """Return the first keys in a folder that come after `done`, and under which there may be files after `after`.

    So many that a folder is seldom read again, and so few that one with a million entries needs little memory.
    """

    def may_match(key: str) -> bool:
        if key <= done:
            return False
        if key.endswith("/"):
            return (key.startswith(prefix) or prefix.startswith(key)) and (key > after or after.startswith(key))
        return key.startswith(prefix) and key > after

    try:
        with os.scandir(folder) as entries:
            # A folder sorts with its slash, as the keys of its files do.
            keys = (f"{folder_key}{entry.name}{'/' if entry.is_dir() else ''}" for entry in entries)
            return heapq.nsmallest(KEYS_READ_AT_ONCE, filter(may_match, keys))
    except FileNotFoundError:
        return []  # deleted with its last object


def _checked(key: str) -> str:
    """Return the key if it is a normalized path below the root. Raises `NotFound`."""
    if not key or any(part in ("", ".", "..") for part in key.split("/")):
        raise NotFound(f"`{key}` is not a valid object key")
    return key


def _disposition(kind: Literal["inline", "attachment"], name: str) -> str:
    """Return a Content-Disposition (RFC 6266)."""
    return f'{kind}; filename="{name}"'


def _credentials(settings: StorageSettings) -> Any:
    """Return the credentials of the settings, or those that the AWS client finds; None if there are none."""
    if settings.access_key_id:
        return Credentials(settings.access_key_id, settings.secret_access_key)
    return cast(Any, boto3).Session().get_credentials()


def _bucket_url(settings: StorageSettings) -> str:
    """Return the URL under which callers reach the bucket, without a slash at its end."""
    client = _client(settings, settings.public_endpoint_url or settings.endpoint_url, UNSIGNED)
    url = client.generate_presigned_url("get_object", Params={"Bucket": settings.bucket, "Key": "key"})
    return url.removesuffix("/key")


def _client(settings: StorageSettings, endpoint_url: str, signature_version: Any) -> "S3Client":
    connect: Callable[..., S3Client] = cast(Any, boto3).client  # its stub has 400 overloads, most with unknown types
    return connect(
        "s3",
        endpoint_url=endpoint_url or None,
        region_name=settings.region,
        aws_access_key_id=settings.access_key_id or None,
        aws_secret_access_key=settings.secret_access_key or None,
        config=Config(
            signature_version=signature_version,
            # None leaves the choice to the environment, none of whose proxies reaches a server of this host.
            proxies={} if is_loopback(urlsplit(endpoint_url).hostname or "") else None,
            s3={"addressing_style": settings.addressing_style},
            # A call ends after half a minute at most. Whoever has more patience repeats it.
            retries={"mode": "standard", "max_attempts": TRIES},
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=READ_TIMEOUT_S,
            max_pool_connections=32,
            # Otherwise bodies have checksums in `aws-chunked` trailers, which many stores refuse, or store as content.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )

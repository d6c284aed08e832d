"""Where pictures lie: an S3-compatible bucket, or a directory that the API serves by signed, expiring links.

Takes keys and bytes; gives bytes and links. The two kinds behave alike: a put is whole or not there, a delete of
nothing is no error, a link works without a key until it expires. Does not know jobs, and does not retry beyond what the
S3 client itself does.
"""

import contextlib
import hashlib
import hmac
import os
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, cast
from urllib.parse import quote, urlencode

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from zcore.errors import ConfigurationError, InvalidLink, NotFound, StorageError
from zcore.settings import Settings, StorageSettings

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

FILES_ROUTE = "/files"
FOLDER_MADE_AT_MOST = 20
DELETED_AT_ONCE = 1000  # the most that one S3 DeleteObjects call takes


@dataclass(frozen=True, slots=True)
class Link:
    """A link to an object that works without a key until `expires_at`."""

    url: str
    expires_at: datetime


class Storage(Protocol):
    """What the product asks of an object store. Every method raises `StorageError` when the store does not answer."""

    def prepare(self) -> None:
        """Makes the bucket or directory if it is not there."""
        ...

    def put(self, key: str, content: bytes, content_type: str) -> None:
        """Stores an object; one of the same key is replaced."""
        ...

    def get(self, key: str) -> bytes:
        """The object's bytes. Raises `NotFound`."""
        ...

    def link(self, key: str) -> Link:
        """A link of now. Does not look whether the object is there."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Deletes objects; those that are not there are no error."""
        ...


def open_storage(settings: Settings, link_key: str) -> Storage:
    """The store that the settings name: a bucket where there is one, else a directory in `data_dir`."""
    if settings.storage.bucket:
        return BucketStorage(settings.storage)
    return DirectoryStorage(
        settings.data_path / "storage", settings.public_url, link_key, settings.storage.link_expiry_s
    )


class DirectoryStorage:
    """Objects as files below one directory. Links lead to the API, which checks them with `open_link`."""

    def __init__(self, root: Path, public_url: str, link_key: str, link_expiry_s: int) -> None:
        self._root = root
        self._public_url = public_url
        self._link_key = link_key.encode()
        self._link_expiry = timedelta(seconds=link_expiry_s)

    def prepare(self) -> None:
        try:
            self._root.mkdir(parents=True, exist_ok=True)
        except OSError as fault:
            raise ConfigurationError(f"data_dir: {self._root} cannot be made: {fault.strerror}") from fault

    def put(self, key: str, content: bytes, content_type: str) -> None:
        path = self._path(key)
        draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            with _opened(draft) as file:
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

    def link(self, key: str) -> Link:
        expires_at = (datetime.now(UTC) + self._link_expiry).replace(microsecond=0)
        expires = int(expires_at.timestamp())
        query = urlencode({"expires": expires, "signature": self._signature(_checked(key), expires)})
        return Link(f"{self._public_url}{FILES_ROUTE}/{quote(key)}?{query}", expires_at)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            path = self._path(key)
            try:
                path.unlink(missing_ok=True)
            except OSError as fault:
                raise StorageError(f"{key}: cannot be deleted: {fault.strerror}") from fault
            if path.parent != self._root:
                # The folder of a job goes with its last picture.
                with contextlib.suppress(OSError):
                    path.parent.rmdir()

    def open_link(self, key: str, expires: int, signature: str) -> Path:
        """The file behind a link. Raises `InvalidLink` for a wrong or old signature, `NotFound` for a purged object."""
        if not hmac.compare_digest(self._signature(key, expires).encode(), signature.encode()):
            raise InvalidLink("the link's signature does not fit")
        if expires < datetime.now(UTC).timestamp():
            raise InvalidLink("the link has expired; the job's own address gives a fresh one")
        path = self._path(key)
        if not path.is_file():
            raise NotFound(f"there is no object {key}")
        return path

    def _signature(self, key: str, expires: int) -> str:
        return hmac.new(self._link_key, f"{key}\n{expires}".encode(), hashlib.sha256).hexdigest()

    def _path(self, key: str) -> Path:
        return self._root / _checked(key)


class BucketStorage:
    """Objects in an S3-compatible bucket.

    Links are presigned GETs, for `public_endpoint_url` where callers need another.
    """

    def __init__(self, settings: StorageSettings) -> None:
        self._bucket = settings.bucket
        self._region = settings.region
        self._link_expiry_s = settings.link_expiry_s
        self._client = _client(settings, settings.endpoint_url)
        public = settings.public_endpoint_url
        self._public_client = _client(settings, public) if public else self._client

    def prepare(self) -> None:
        try:
            self._client.head_bucket(Bucket=self._bucket)
        except ClientError as fault:
            if _status(fault) in (401, 403):
                raise ConfigurationError(
                    f"storage.access_key_id, secret_access_key: give no access to bucket {self._bucket}: {fault}"
                ) from fault
            if _status(fault) != 404:
                raise StorageError(f"bucket {self._bucket}: {fault}") from fault
            self._create_bucket()
        except BotoCoreError as fault:
            raise StorageError(f"bucket {self._bucket}: {fault}") from fault

    def put(self, key: str, content: bytes, content_type: str) -> None:
        with _Faults(_checked(key)):
            self._client.put_object(Bucket=self._bucket, Key=key, Body=content, ContentType=content_type)

    def get(self, key: str) -> bytes:
        with _Faults(_checked(key)):
            return self._client.get_object(Bucket=self._bucket, Key=key)["Body"].read()

    def link(self, key: str) -> Link:
        expires_at = (datetime.now(UTC) + timedelta(seconds=self._link_expiry_s)).replace(microsecond=0)
        with _Faults(_checked(key)):
            url = self._public_client.generate_presigned_url(
                "get_object", Params={"Bucket": self._bucket, "Key": key}, ExpiresIn=self._link_expiry_s
            )
        return Link(url, expires_at)

    def delete(self, keys: Iterable[str]) -> None:
        wanted = [_checked(key) for key in keys]
        for start in range(0, len(wanted), DELETED_AT_ONCE):
            some = wanted[start : start + DELETED_AT_ONCE]
            with _Faults(some[0]):
                answer = self._client.delete_objects(
                    Bucket=self._bucket, Delete={"Objects": [{"Key": key} for key in some], "Quiet": True}
                )
            for refused in answer.get("Errors", []):
                raise StorageError(f"{refused.get('Key')}: {refused.get('Code')}: {refused.get('Message')}")

    def _create_bucket(self) -> None:
        with _Faults(self._bucket):
            if self._region == "us-east-1":
                self._client.create_bucket(Bucket=self._bucket)
            else:
                # boto3 types the region as an enumeration of AWS's own; other stores name theirs freely.
                self._client.create_bucket(
                    Bucket=self._bucket,
                    CreateBucketConfiguration={"LocationConstraint": self._region},  # pyright: ignore[reportArgumentType]
                )


class _Faults:
    """Turns the client's exceptions into ours."""

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


def _opened(draft: Path) -> BinaryIO:
    """A new file in its folder, made again where that goes with its last other file at this very moment."""
    for _ in range(FOLDER_MADE_AT_MOST):
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            draft.parent.mkdir(parents=True, exist_ok=True)
            return draft.open("wb")
    return draft.open("wb")


def _checked(key: str) -> str:
    """The key, where it names one place below the root, written in the one way. Raises `NotFound`."""
    if not key or any(part in ("", ".", "..") for part in key.split("/")):
        raise NotFound(f"`{key}` names no object")
    return key


def _client(settings: StorageSettings, endpoint_url: str) -> "S3Client":
    connect: Callable[..., S3Client] = cast(Any, boto3).client  # its stub has 400 overloads, most of them unknown
    return connect(
        "s3",
        endpoint_url=endpoint_url or None,
        region_name=settings.region,
        aws_access_key_id=settings.access_key_id or None,
        aws_secret_access_key=settings.secret_access_key or None,
        config=Config(
            signature_version="s3v4",
            s3={"addressing_style": settings.addressing_style},
            retries={"mode": "standard", "max_attempts": 3},
            connect_timeout=5,
            read_timeout=30,
            max_pool_connections=32,
        ),
    )

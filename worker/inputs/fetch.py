"""Fetches the inputs of a request: uploads and earlier outputs from storage, LoRAs from the cache, other images by URL.

An owner reaches only their own uploads and outputs. A URL is checked as strictly as a webhook's, and its content is
read up to the operator's limit.
"""

import asyncio
import hashlib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import httpx

from worker.abandonable import CHECK_INTERVAL_S, in_daemon_thread
from worker.inputs.lora_cache import LoraCache
from worker.outbound.addresses import resolve
from worker.outbound.client import OutboundClient
from worker.patient_storage import Check, PatientStorage
from zcore.errors import ForbiddenAddress, InputUnavailable, NotFound
from zcore.image_files.input_images import open_image
from zcore.imaging.generation_inputs import Inputs
from zcore.jobs import uploads
from zcore.jobs.database import Database
from zcore.request import INPUT_FIELDS, GenerationRequest, JobOutput, RequestLimits, Upload, parse_input_address
from zcore.settings import WebhooksSettings

if TYPE_CHECKING:
    from zcore.imaging.oom_fallback import OnFallback

HEADERS = {"user-agent": "zimage-inputs/1", "accept": "image/*"}
TOO_MANY_REQUESTS = 429


@dataclass(frozen=True, slots=True)
class FetchedInputs:
    """The inputs that a request names, and the SHA-256 (hexadecimal) of each image file, by field name."""

    inputs: Inputs
    sha256s: Mapping[str, str]


class InputSource:
    """Fetches the inputs of jobs. Safe to share between threads."""

    def __init__(
        self,
        database: Database,
        storage: PatientStorage,
        outbound: WebhooksSettings,
        limits: RequestLimits,
        loras: LoraCache | None = None,
    ) -> None:
        """`outbound` states which addresses are allowed and how long one download may take.

        `limits` are those of one file. Without `loras`, no LoRA is available.
        """
        self._database = database
        self._storage = storage
        self._settings = outbound
        self._limits = limits
        self._loras = loras or LoraCache.empty()
        self._client = OutboundClient()

    def fetch(
        self,
        request: GenerationRequest,
        owner: str,
        check: Check,
        on_fallback: "OnFallback",
    ) -> FetchedInputs:
        """Return all inputs that the request names, opened.

        `check` is called repeatedly while files are read; an exception that it raises ends that. `on_fallback` receives
        each out-of-memory fallback step that loading a LoRA takes. Raises `InputUnavailable` if an input cannot be
        fetched, `InvalidRequest` if a file is not an image, and `StorageError`.
        """
        addresses = {name: address for name in INPUT_FIELDS if (address := getattr(request, name)) is not None}
        files = {name: self._read(name, address, owner, check) for name, address in addresses.items()}
        images = {name: open_image(content, name, self._limits.max_input_pixels) for name, content in files.items()}
        sha256s = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        loras = {use.name: self._loras.get(use.name, on_fallback, check) for use in request.loras}
        return FetchedInputs(Inputs(images.get("image"), images.get("mask"), loras=loras), sha256s)

    def _read(self, field: str, address: str, owner: str, check: Check) -> bytes:
        match parse_input_address(address):
            case Upload(sha256):
                return self._read_upload(field, sha256, owner, check)
            case JobOutput(job_id, index):
                return self._read_output(field, job_id, index, owner, check)
            case _:
                return self._read_url(field, address, check)

    def _read_upload(self, field: str, sha256: str, owner: str, check: Check) -> bytes:
        gone = "this upload has expired and was deleted"
        with self._database.read() as transaction:
            upload = uploads.find(transaction, owner, sha256)
        if upload is None:
            raise InputUnavailable(field, gone)
        return self._read_object(field, upload.storage_key, gone, check)

    def _read_output(self, field: str, job_id: uuid.UUID, index: int, owner: str, check: Check) -> bytes:
        try:
            with self._database.read() as transaction:
                key = uploads.output_of_job(transaction, job_id, index, owner).key
        except NotFound as fault:
            raise InputUnavailable(field, fault.message) from fault
        return self._read_object(field, key, f"image {index} of job {job_id} was deleted", check)

    def _read_object(self, field: str, key: str, if_missing: str, check: Check) -> bytes:
        try:
            return self._storage.get(key, check)
        except NotFound as fault:
            raise InputUnavailable(field, if_missing) from fault

    def _read_url(self, field: str, url: str, check: Check) -> bytes:
        try:
            return asyncio.run(self._download_with_checks(field, url, check))
        except ForbiddenAddress as fault:
            raise InputUnavailable(field, fault.message, retryable=fault.retryable) from fault
        except TimeoutError as fault:
            detail = f"the server did not send the file within {self._settings.timeout_s:g} s"
            raise InputUnavailable(field, detail, retryable=True) from fault
        except httpx.HTTPError as fault:
            detail = f"the server could not be reached or closed the connection ({type(fault).__name__})"
            raise InputUnavailable(field, detail, retryable=True) from fault
        except httpx.InvalidURL as fault:
            raise InputUnavailable(field, f"must be a valid URL: {fault}") from fault

    async def _download_with_checks(self, field: str, url: str, check: Check) -> bytes:
        """Download a file; canceled when `check` raises."""
        download = asyncio.create_task(self._download(field, url))
        try:
            while not download.done():
                await asyncio.wait([download], timeout=CHECK_INTERVAL_S)
                check()
            return download.result()
        finally:
            download.cancel()

    async def _download(self, field: str, url: str) -> bytes:
        async with asyncio.timeout(self._settings.timeout_s):
            # `asyncio.to_thread` would wait for its thread when the event loop closes, so a name server that does not
            # answer would block the job even after a cancellation.
            target = await asyncio.wrap_future(in_daemon_thread(partial(resolve, url, self._settings), "resolve"))
            async with self._client.stream("GET", target, HEADERS, self._settings.timeout_s) as response:
                _check_status(field, response.status_code)
                return await self._read_body(field, response)

    async def _read_body(self, field: str, response: httpx.Response) -> bytes:
        """Read the body up to the size limit. The Content-Length header is not trusted."""
        content = bytearray()
        async for chunk in response.aiter_raw():
            content += chunk
            if len(content) > self._limits.max_input_bytes:
                raise InputUnavailable(field, f"is larger than the limit of {self._limits.max_input_bytes} bytes")
        return bytes(content)


def _check_status(field: str, status_code: int) -> None:
    if 200 <= status_code < 300:
        return
    if 300 <= status_code < 400:
        raise InputUnavailable(field, f"the server answered {status_code}, and redirects are not followed")
    retryable = status_code >= 500 or status_code == TOO_MANY_REQUESTS
    raise InputUnavailable(field, f"the server answered {status_code}", retryable=retryable)

"""What a request starts from, fetched: uploads and earlier pictures from storage, LoRAs from this worker's shelf,
everything else from the web.

Takes a request and its owner, who reaches nothing of other owners; gives pictures for the pipeline, and the SHA-256 of
each file. An address on the web is as guarded as a webhook's, and is read no further than the operator allows. Does not
know what becomes of the pictures.
"""

import asyncio
import hashlib
import threading
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import httpx

from worker.addresses import ForbiddenAddress, UnknownHost, resolve
from worker.loras import LoraShelf
from worker.outbound import Outbound
from zcore.errors import InputUnavailable, NotFound
from zcore.imaging.input_picture import open_picture
from zcore.imaging.inputs import Inputs
from zcore.jobs import inputs
from zcore.jobs.database import Database
from zcore.request import INPUT_FIELDS, INPUT_ID, OUTPUT_OF_JOB, GenerationRequest
from zcore.settings import WebhooksSettings
from zcore.storage import Storage

if TYPE_CHECKING:
    from zcore.imaging.relief import OnRelief

T = TypeVar("T")

HEADERS = {"user-agent": "zimage-inputs/1", "accept": "image/*"}
TOO_MANY_REQUESTS = 429
CHECK_INTERVAL_S = 0.2


@dataclass(frozen=True, slots=True)
class FetchedInputs:
    """What a request names, and of each picture, by its field, the SHA-256 of its file in hexadecimal."""

    pictures: Inputs
    sha256s: Mapping[str, str]


class InputSource:
    """Where the inputs of jobs come from. Safe to share between threads."""

    def __init__(
        self,
        database: Database,
        storage: Storage,
        web: WebhooksSettings,
        max_bytes: int,
        loras: LoraShelf | None = None,
    ) -> None:
        """`web` says which addresses are allowed and how long one picture may take; `max_bytes` how large it may be.
        Without `loras` there are none.
        """
        self._database = database
        self._storage = storage
        self._web = web
        self._max_bytes = max_bytes
        self._loras = loras or LoraShelf.empty()
        self._outbound = Outbound()

    def fetch(
        self,
        request: GenerationRequest,
        owner: str,
        check: Callable[[], None],
        on_relief: "OnRelief",
    ) -> FetchedInputs:
        """Everything that the request names, opened. `on_relief` is told what is given up where memory runs out.

        `check` is called all the while; what it raises ends the wait for a slow server. Raises `InputUnavailable` for
        what cannot be had, `InvalidRequest` for what is no picture, and `StorageError`.
        """
        named = {name: address for name in INPUT_FIELDS if (address := getattr(request, name)) is not None}
        files = {name: self._read(name, address, owner, check) for name, address in named.items()}
        pictures = {name: open_picture(content, name) for name, content in files.items()}
        sha256s = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        loras = {use.name: self._loras.get(use.name, on_relief) for use in request.loras}
        return FetchedInputs(Inputs(pictures.get("image"), pictures.get("mask"), loras=loras), sha256s)

    def _read(self, field: str, address: str, owner: str, check: Callable[[], None]) -> bytes:
        if upload := INPUT_ID.fullmatch(address):
            return self._stored(field, inputs.key_of(owner, upload[1]), "this upload was deleted after its time")
        if painted := OUTPUT_OF_JOB.fullmatch(address):
            return self._painted(field, uuid.UUID(painted[1]), int(painted[2]), owner)
        return self._downloaded(field, address, check)

    def _painted(self, field: str, job_id: uuid.UUID, position: int, owner: str) -> bytes:
        try:
            with self._database.read() as transaction:
                key = inputs.picture_of_job(transaction, job_id, position, owner).key
        except NotFound as fault:
            raise InputUnavailable(field, fault.message) from fault
        return self._stored(field, key, f"picture {position} of job {job_id} was deleted")

    def _stored(self, field: str, key: str, missing: str) -> bytes:
        try:
            return self._storage.get(key)
        except NotFound as fault:
            raise InputUnavailable(field, missing) from fault

    def _downloaded(self, field: str, url: str, check: Callable[[], None]) -> bytes:
        try:
            return asyncio.run(self._download_while(field, url, check))
        except ForbiddenAddress as fault:
            raise InputUnavailable(field, str(fault), retryable=isinstance(fault, UnknownHost)) from fault
        except TimeoutError as fault:
            detail = f"the server did not give it within {self._web.timeout_s:g} s"
            raise InputUnavailable(field, detail, retryable=True) from fault
        except httpx.HTTPError as fault:
            detail = f"the server was not reached or broke off ({type(fault).__name__})"
            raise InputUnavailable(field, detail, retryable=True) from fault
        except httpx.InvalidURL as fault:
            raise InputUnavailable(field, f"is not an address that can be asked for: {fault}") from fault

    async def _download_while(self, field: str, url: str, check: Callable[[], None]) -> bytes:
        """The download, given up when `check` raises."""
        download = asyncio.create_task(self._download(field, url))
        try:
            while not download.done():
                await asyncio.wait([download], timeout=CHECK_INTERVAL_S)
                check()
            return download.result()
        finally:
            download.cancel()

    async def _download(self, field: str, url: str) -> bytes:
        async with asyncio.timeout(self._web.timeout_s):
            target = await _beside(partial(resolve, url, self._web.allow_private_addresses))
            async with self._outbound.answer("GET", target, HEADERS, self._web.timeout_s) as response:
                _check_status(field, response.status_code)
                return await self._bounded(field, response)

    async def _bounded(self, field: str, response: httpx.Response) -> bytes:
        """The body, cut off where it is larger than allowed, whatever its length said before."""
        content = bytearray()
        async for piece in response.aiter_raw():
            content += piece
            if len(content) > self._max_bytes:
                raise InputUnavailable(field, f"is larger than the {self._max_bytes} bytes that are taken")
        return bytes(content)


async def _beside(work: Callable[[], T]) -> T:
    """What blocking work gives. Given up, it goes on in a thread that nobody waits for, not even at the end.

    `asyncio.to_thread` would be waited for: a name server that does not answer would hold the job nevertheless.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            found = work()
        except Exception as fault:
            outcome.set_exception(fault)
        else:
            outcome.set_result(found)

    outcome.set_running_or_notify_cancel()
    threading.Thread(target=run, name="resolve", daemon=True).start()
    return await asyncio.wrap_future(outcome)


def _check_status(field: str, status_code: int) -> None:
    if 200 <= status_code < 300:
        return
    if 300 <= status_code < 400:
        raise InputUnavailable(field, f"the server answered {status_code}, and redirects are not followed")
    passing = status_code >= 500 or status_code == TOO_MANY_REQUESTS
    raise InputUnavailable(field, f"the server answered {status_code}", retryable=passing)

"""The LoRA library: every caller may list it; changing it requires the admin key."""

import hashlib
from typing import Annotated

import msgspec
from litestar import Response, delete, get, post
from litestar.params import FromPath, QueryParameter

from server import media_types
from server.bodies import BodyRequest
from server.callers import admin_only
from server.dependencies import NamedCaller, NamedDatabase, NamedStorage, NamedThreads
from server.problems import refusal
from server.schemas import LoraList, RegisteredLora
from zcore.errors import Conflict, FieldError, InvalidRequest
from zcore.jobs import leftovers, lora_library
from zcore.jobs.database import Database
from zcore.jobs.lora_library import UploadedLora
from zcore.jobs.models import Lora
from zcore.request import LoraName
from zcore.safetensors_header import InvalidSafetensors, read_safetensors_header
from zcore.storage import Storage
from zcore.storage_keys import new_lora_key


@post(
    "/api/loras",
    guards=[admin_only, media_types.only("application/octet-stream")],
    status_code=201,
    tags=["loras"],
    summary="Register a LoRA",
    operation_class=media_types.file_body("The safetensors file", "application/octet-stream"),
    responses={
        400: refusal("The name is invalid, or the body is not a safetensors file"),
        409: refusal("A different LoRA already has that name"),
        413: refusal("The body is larger than `lora.max_bytes`"),
        415: refusal("The body is not `application/octet-stream`"),
    },
)
async def register_lora(
    request: BodyRequest,
    database: NamedDatabase,
    storage: NamedStorage,
    threads: NamedThreads,
    name: Annotated[str, QueryParameter(max_length=100, description="The name that requests use")],
    licence: Annotated[str, QueryParameter(min_length=1, max_length=10_000, description="The licence of the file")],
    strict: Annotated[
        bool, QueryParameter(description="`false` leaves out what does not fit the model, instead of refusing the file")
    ] = True,
) -> Response[RegisteredLora]:
    """Answers 201. Requires the admin key.

    Whether the LoRA fits the model is checked when a worker first uses it; what `strict=false` leaves out is listed in
    `engine` of each job that uses it, as `lora_notice:NAME`.
    """
    async with request.spooled() as file:
        body = await threads.local.run(file.read)
        upload = await threads.local.run(_checked, name, licence, body, strict=strict)
        return Response(await threads.storage.run(_register, database, storage, upload, body))


@get(
    "/api/loras",
    tags=["loras"],
    summary="List the LoRAs that a request may use",
    sync_to_thread=True,
)
def list_loras(caller: NamedCaller, database: NamedDatabase) -> LoraList:
    """Lists the LoRAs by name, each with its licence. Files in a worker's `lora.folder` are not listed."""
    with database.read() as transaction:
        return LoraList([_resource(lora) for lora in lora_library.list_all(transaction)])


@delete(
    "/api/loras/{name:str}",
    guards=[admin_only],
    tags=["loras"],
    summary="Remove a LoRA",
    responses={
        404: refusal("There is no such LoRA"),
    },
    sync_to_thread=True,
)
def remove_lora(name: FromPath[str], database: NamedDatabase) -> None:
    """Answers 204. Requires the admin key. Queued jobs that use it will fail."""
    with database.write() as transaction:
        leftovers.add_object(transaction, lora_library.remove(transaction, name))


def _register(database: Database, storage: Storage, upload: UploadedLora, body: bytes) -> RegisteredLora:
    with database.read() as transaction:
        registered = lora_library.find_same(transaction, upload)  # asked first, so that a refused file is never stored
    if registered is not None:
        return _resource(registered)
    key = new_lora_key(upload.name, upload.sha256)
    storage.put(key, body, "application/octet-stream")
    try:
        with database.write() as transaction:
            registered = lora_library.register(transaction, upload, key)
            if registered.storage_key != key:
                leftovers.add_object(transaction, key)
    except Conflict:
        with database.write() as transaction:
            leftovers.add_object(transaction, key)
        raise
    return _resource(registered)


def _checked(name: str, licence: str, content: bytes, *, strict: bool) -> UploadedLora:
    """Return the upload if its name and its header are valid; the server has no model to check more with.

    Raises `InvalidRequest`.
    """
    try:
        msgspec.convert(name, LoraName)
    except msgspec.ValidationError as fault:
        detail = "must begin with a letter or digit and contain only letters, digits, `.`, `_` and `-`, at most 100"
        raise InvalidRequest.field("name", detail, "query") from fault
    try:
        if not read_safetensors_header(content).tensors:
            raise InvalidSafetensors("has no tensors")
    except InvalidSafetensors as fault:
        detail = "the body must be a complete safetensors file with at least one tensor"
        raise InvalidRequest([FieldError("", detail)]) from fault
    return UploadedLora(name, hashlib.sha256(content).hexdigest(), licence, len(content), strict)


def _resource(lora: Lora) -> RegisteredLora:
    return RegisteredLora(lora.name, lora.sha256, lora.licence, lora.bytes, lora.created_at, lora.strict)

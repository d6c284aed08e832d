"""The library of LoRAs: whoever may submit looks at it, the admin key changes it."""

import hashlib
from typing import Annotated, Any

import msgspec
from litestar import Response, delete, get, post
from litestar.params import FromPath, QueryParameter, RawBody

from server import media_types
from server.auth import admin_only
from server.dependencies import NamedDatabase, NamedStorage, Owner
from server.problems import refusal
from server.schemas import LoraList, RegisteredLora
from zcore.errors import InvalidRequest
from zcore.jobs import loras
from zcore.jobs.loras import UploadedLora
from zcore.jobs.models import Lora
from zcore.request import LoraName

HEADER_BYTES_AT_MOST = 100_000_000  # as the format has it


@post(
    "/api/loras",
    guards=[admin_only, media_types.only("application/octet-stream")],
    status_code=201,
    tags=["loras"],
    summary="Register a LoRA",
    operation_class=media_types.body_of("The safetensors file", "application/octet-stream"),
    responses={
        400: refusal("The name is not one that a request can use, or the body is no safetensors file"),
        401: refusal("No admin key, or a wrong one"),
        409: refusal("There is another LoRA of that name"),
        413: refusal("The body is larger than `lora.max_bytes`"),
        415: refusal("The body is not `application/octet-stream`"),
        503: refusal("The database or the storage does not answer"),
    },
    sync_to_thread=True,
)
def register_lora(
    body: RawBody,
    database: NamedDatabase,
    storage: NamedStorage,
    name: Annotated[str, QueryParameter(max_length=100, description="What requests call it")],
    licence: Annotated[str, QueryParameter(min_length=1, max_length=10_000, description="Under which it may be used")],
) -> Response[RegisteredLora]:
    """Answers 201. Only the admin key may. Whether the file fits the model is known when a worker first uses it."""
    _check(name, body)
    upload = UploadedLora(name, hashlib.sha256(body).hexdigest(), licence, len(body))
    with database.read() as transaction:
        loras.check_free(transaction, upload)  # or a refused file would lie in storage for ever
    storage.put(loras.key_of(name, upload.sha256), body, "application/octet-stream")
    with database.write() as transaction:
        return Response(_resource(loras.register(transaction, upload)))


@get(
    "/api/loras",
    tags=["loras"],
    summary="LoRAs that a request may name",
    responses={401: refusal("No API key, or a wrong one"), 503: refusal("The database does not answer")},
    sync_to_thread=True,
)
def list_loras(owner: Owner, database: NamedDatabase) -> LoraList:
    """By name, each with its licence. Those in a worker's `lora.folder` are not among them."""
    with database.read() as transaction:
        return LoraList([_resource(lora) for lora in loras.listed(transaction)])


@delete(
    "/api/loras/{name:str}",
    guards=[admin_only],
    tags=["loras"],
    summary="Remove a LoRA",
    responses={
        401: refusal("No admin key, or a wrong one"),
        404: refusal("There is no such LoRA"),
        503: refusal("The database or the storage does not answer"),
    },
    sync_to_thread=True,
)
def remove_lora(name: FromPath[str], database: NamedDatabase, storage: NamedStorage) -> None:
    """Answers 204. Only the admin key may. Jobs that still name it fail when their turn comes."""
    with database.write() as transaction:
        key = loras.remove(transaction, name)
    storage.delete([key])


def _check(name: str, content: bytes) -> None:
    """Raises `InvalidRequest`; looks at the header alone, since the server carries no model."""
    try:
        msgspec.convert(name, LoraName)
    except msgspec.ValidationError as fault:
        detail = "must begin with a letter or digit, and hold none but these, `.`, `_` and `-`"
        raise InvalidRequest.field("name", detail) from fault
    length = int.from_bytes(content[:8], "little")
    try:
        if not 0 < length <= min(HEADER_BYTES_AT_MOST, len(content) - 8):
            raise ValueError("the header is longer than the file")
        header = msgspec.json.decode(content[8 : 8 + length], type=dict[str, dict[str, Any]])
        header.pop("__metadata__", None)
        ends = [int(tensor["data_offsets"][1]) for tensor in header.values()]
        if not ends or max(ends) != len(content) - 8 - length:
            raise ValueError("the file breaks off")
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as fault:
        raise InvalidRequest.field("body", "is no whole safetensors file, and no other kind is taken") from fault


def _resource(lora: Lora) -> RegisteredLora:
    return RegisteredLora(lora.name, lora.sha256, lora.licence, lora.bytes, lora.created_at)

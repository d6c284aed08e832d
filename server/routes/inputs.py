"""Upload pictures that jobs start from."""

import asyncio
import hashlib

from litestar import Response, post
from litestar.params import RawBody

from server import media_types
from server.auth import callers_only
from server.dependencies import NamedDatabase, NamedOpening, NamedSettings, NamedStorage, Owner
from server.problems import refusal
from server.schemas import UploadedInput
from zcore.errors import InvalidRequest
from zcore.imaging.input_picture import format_of, open_picture
from zcore.jobs import inputs
from zcore.jobs.database import Database
from zcore.jobs.inputs import UploadedPicture
from zcore.storage import Storage

OPENED_AT_ONCE = 2
"""A small file may hold a picture that takes half a gigabyte of memory while it is open."""
FIELD = "image"
"""What a refusal of an upload names: the field that it would have been for."""


@post(
    "/api/inputs",
    guards=[callers_only, media_types.only("image/*", "application/octet-stream")],
    status_code=201,
    tags=["inputs"],
    summary="Upload a picture to start from",
    operation_class=media_types.body_of("The file itself", "image/*", "application/octet-stream"),
    responses={
        400: refusal("The body is not a picture that can be opened"),
        401: refusal("No API key, or a wrong one"),
        413: refusal("The body is larger than `limits.max_input_bytes`"),
        415: refusal("The body is neither `image/*` nor `application/octet-stream`"),
        503: refusal("The database or the storage does not answer"),
    },
)
async def upload(
    body: RawBody,
    owner: Owner,
    settings: NamedSettings,
    database: NamedDatabase,
    storage: NamedStorage,
    opening: NamedOpening,
) -> Response[UploadedInput]:
    """Answers 201 with the upload's `id`, for `image` and `mask` of a submission until `expires_at`.

    The same bytes again have the same id, and are kept for longer.
    """
    async with opening:
        picture = await asyncio.to_thread(_opened, body)
    retention_s = settings.jobs.input_retention_s
    return Response(await asyncio.to_thread(_stored, database, storage, owner, picture, body, retention_s))


def _opened(body: bytes) -> UploadedPicture:
    if not body:
        raise InvalidRequest.field(FIELD, "the body is empty")
    image = open_picture(body, FIELD)
    return UploadedPicture(hashlib.sha256(body).hexdigest(), format_of(body), image.width, image.height, len(body))


def _stored(
    database: Database, storage: Storage, owner: str, picture: UploadedPicture, body: bytes, retention_s: float
) -> UploadedInput:
    with database.write() as transaction:
        kept = inputs.keep(transaction, owner, picture, retention_s)
    storage.put(inputs.key_of(owner, picture.sha256), body, f"image/{picture.format}")
    return UploadedInput(f"input:{kept.sha256}", kept.width, kept.height, kept.format, kept.bytes, kept.expires_at)

"""Uploads of images that jobs start from."""

import hashlib
from typing import IO

from litestar import Response, post

from server import media_types
from server.bodies import BodyRequest
from server.callers import Caller, callers_only
from server.dependencies import NamedCaller, NamedDatabase, NamedSettings, NamedStorage, NamedThreads, NamedUploadSlots
from server.problems import refusal
from server.schemas import UploadedInput
from zcore.errors import InvalidRequest, StorageError
from zcore.image_files.input_images import image_format, open_image
from zcore.jobs import uploads
from zcore.jobs.database import Database
from zcore.jobs.uploads import UploadedImage
from zcore.storage import Storage

MAX_CONCURRENT_DECODES = 2
"""How many uploads are decoded at a time: even a small file may decode to half a gigabyte."""
ERROR_FIELD = "image"
"""The field that errors of an upload point to: the field of a submission that uses the upload."""


@post(
    "/api/inputs",
    guards=[callers_only, media_types.only("image/*", "application/octet-stream")],
    status_code=201,
    tags=["inputs"],
    summary="Upload an image to start from",
    operation_class=media_types.file_body("The image file itself", "image/*", "application/octet-stream"),
    responses={
        400: refusal("The body is not an image that can be opened"),
        413: refusal("The body is larger than `limits.max_input_bytes`"),
        415: refusal("The body is neither `image/*` nor `application/octet-stream`"),
    },
)
async def upload_input(
    request: BodyRequest,
    caller: NamedCaller,
    settings: NamedSettings,
    database: NamedDatabase,
    storage: NamedStorage,
    upload_slots: NamedUploadSlots,
    threads: NamedThreads,
) -> Response[UploadedInput]:
    """Answers 201 with the upload's `id`, which `image` and `mask` of a submission accept until `expires_at`.

    Uploading the same bytes again returns the same id and extends its lifetime.
    """
    retention_s = settings.jobs.input_retention_s
    async with request.spooled() as file:
        async with upload_slots:
            image = await threads.local.run(_inspect, file, settings.limits.max_input_pixels)
        return Response(await threads.storage.run(_store, database, storage, caller, image, file, retention_s))


def _inspect(file: IO[bytes], max_pixels: int) -> UploadedImage:
    body = file.read()
    if not body:
        raise InvalidRequest.field(ERROR_FIELD, "the body is empty; it must be the image file itself")
    image = open_image(body, ERROR_FIELD, max_pixels)
    return UploadedImage(hashlib.sha256(body).hexdigest(), image_format(body), image.width, image.height, len(body))


def _store(
    database: Database, storage: Storage, caller: Caller, image: UploadedImage, file: IO[bytes], retention_s: float
) -> UploadedInput:
    file.seek(0)
    with database.write() as transaction:
        recorded = uploads.record(transaction, caller.name, image)
    storage.put(recorded.storage_key, file.read(), f"image/{image.format}")
    with database.write() as transaction:
        row = uploads.mark_stored(transaction, recorded, retention_s)
    if row is None:
        raise StorageError(f"{recorded.storage_key}: storing the image took too long")
    return UploadedInput(f"input:{row.sha256}", row.width, row.height, row.format, row.bytes, row.expires_at)

"""Serves images from a storage directory by signed link. A bucket serves its own files."""

import time
from pathlib import PurePosixPath
from typing import Annotated, get_args

from litestar import get
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import FromPath, FromQuery, QueryParameter
from litestar.types import ASGIApp

from server import media_types
from server.dependencies import NamedStorage, NamedThreads
from server.file_responses import FileResponse
from server.problems import refusal
from zcore.api_paths import FILES_PATH
from zcore.errors import NotFound
from zcore.request import OutputFormat
from zcore.storage import DirectoryStorage


@get(
    f"{FILES_PATH}/{{key:path}}",
    tags=["jobs"],
    summary="Download an image by signed link",
    operation_class=media_types.ImageOperation,
    responses={
        206: ResponseSpec(
            bytes,
            media_type="image/*",
            description="The part of the image that `Range` asks for",
            generate_examples=False,
        ),
        304: ResponseSpec(
            None, description="The copy that `If-None-Match` or `If-Modified-Since` describes is current"
        ),
        403: refusal("The link was altered or has expired"),
        404: refusal("The image was deleted"),
        412: ResponseSpec(None, description="`If-Match` or `If-Unmodified-Since` describes another image"),
        416: ResponseSpec(None, description="The image has no bytes in the range that `Range` asks for"),
    },
)
async def get_file(
    storage: NamedStorage,
    key: FromPath[str],
    expires: FromQuery[int],
    disposition: Annotated[str, QueryParameter(max_length=256)],
    signature: Annotated[str, QueryParameter(max_length=128)],
    threads: NamedThreads,
) -> ASGIApp:
    """Returns the image that a link in `outputs[].url` or `outputs[].download_url` names.

    Preconditions and a single range work as RFC 9110 defines them, so that a download can be resumed. Clients may cache
    the image until the link expires.
    """
    if not isinstance(storage, DirectoryStorage):
        raise NotFound("this installation stores its images in a bucket; use the links in the job's outputs")
    opened = await threads.files.run(storage.open_link, key.removeprefix("/"), expires, disposition, signature)
    headers = {
        "content-type": _media_type(key),
        "content-disposition": disposition,
        "cache-control": f"private, max-age={max(0, expires - int(time.time()))}",
        "x-content-type-options": "nosniff",
    }
    return FileResponse(opened, headers, threads.files)


def _media_type(key: str) -> str:
    """Return the media type by suffix; `mimetypes` knows AVIF only where the system has a file of types."""
    suffix = PurePosixPath(key).suffix.removeprefix(".")
    return f"image/{suffix}" if suffix in get_args(OutputFormat) else "application/octet-stream"

"""Pictures of the directory storage, by signed links. A bucket serves its own."""

from typing import Annotated

from litestar import get
from litestar.params import FromPath, FromQuery, QueryParameter
from litestar.response import File

from server.dependencies import NamedStorage
from zcore.errors import NotFound
from zcore.storage import FILES_ROUTE, DirectoryStorage


@get(f"{FILES_ROUTE}/{{key:path}}", tags=["jobs"], summary="A picture, by a signed link", sync_to_thread=True)
def file(
    storage: NamedStorage,
    key: FromPath[str],
    expires: FromQuery[int],
    signature: Annotated[str, QueryParameter(max_length=128)],
) -> File:
    """The links in `outputs[].url` lead here.

    403 when the link is altered or too old, 404 when the picture was purged.
    """
    if not isinstance(storage, DirectoryStorage):
        raise NotFound("pictures of this installation lie in a bucket")
    path = storage.open_link(key.removeprefix("/"), expires, signature)
    headers = {"cache-control": "private, max-age=3600", "x-content-type-options": "nosniff"}
    return File(path, filename=path.name, content_disposition_type="inline", headers=headers)

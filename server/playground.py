"""The playground: one page to try the service in a browser.

Takes nothing but the settings; gives public HTML without a secret, whose script (`playground.js` among the assets)
calls the API like any other caller, with the key that its reader types where keys are configured. Does not know jobs.
"""

from typing import get_args

from litestar import get
from litestar.response import Template

from server.dependencies import NamedSettings, NamedStorage
from server.pages import page_headers
from zcore.request import LongPromptMode, OutputFormat


@get("/playground", include_in_schema=False, sync_to_thread=True)
def playground(settings: NamedSettings, storage: NamedStorage) -> Template:
    """A form for a request, and its job followed to the pictures."""
    context = {
        "keyed": bool(settings.server.api_keys),
        "usual": settings.generation_defaults,
        "formats": get_args(OutputFormat),
        "long_prompt_modes": get_args(LongPromptMode),
    }
    where_pictures_are = storage.link("playground").url
    return Template("playground.html", context=context, headers=page_headers([where_pictures_are], scripted=True))

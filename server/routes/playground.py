"""The playground: one page to try the service in a browser.

The page is public and contains no secret. Its script (`playground.js` among the assets) calls the API like any other
caller, with the API key that the user enters if keys are configured.
"""

from typing import get_args

from litestar import get
from litestar.response import Template

from server.dependencies import NamedDefaults, NamedSettings, NamedStorage
from server.pages import page_headers
from zcore.request import LongPromptMode, OutputFormat


@get("/playground", include_in_schema=False, sync_to_thread=True)
def playground(settings: NamedSettings, defaults: NamedDefaults, storage: NamedStorage) -> Template:
    """Show the request form and the result of its job."""
    context = {
        "needs_key": not settings.server.keyless,
        "defaults": defaults,
        "formats": get_args(OutputFormat),
        "long_prompt_modes": get_args(LongPromptMode),
    }
    example_image_url = storage.link("playground", "playground").url  # every image has the same origin
    return Template("playground.html", context=context, headers=page_headers([example_image_url], scripted=True))

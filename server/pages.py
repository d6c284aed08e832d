"""What all HTML pages share, in the admin and the playground: templates, assets, security headers.

Pages are rendered from `templates/pages/`. Does not depend on what a page shows.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast
from urllib.parse import urlsplit

import jinja2
from litestar import get
from litestar.params import FromPath
from litestar.plugins.jinja import JinjaTemplateEngine
from litestar.response import File
from litestar.template import TemplateConfig

from zcore.errors import NotFound
from zcore.settings import TREE

ASSETS_PATH = "/admin/assets"
ASSETS = ("style.css", "icon.svg", "playground.css", "playground.js")
_TEMPLATES_FOLDER = TREE / "templates" / "pages"
_ASSETS_FOLDER = _TEMPLATES_FOLDER / "assets"


def template_config(filters: Mapping[str, Callable[..., str]]) -> TemplateConfig[JinjaTemplateEngine]:
    """Configure the page templates with these filters. An undefined variable in a template is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    cast(dict[str, Any], environment.globals)["assets_version"] = _assets_version()
    return TemplateConfig(instance=JinjaTemplateEngine.from_environment(environment))


def page_headers(image_urls: Sequence[str], *, scripted: bool = False) -> dict[str, str]:
    """Return a page's security headers: no framing, no scripts, our own styles, and images from here and these origins.

    A `scripted` page may also run our own script, call this server, and show files that the user chose.
    """
    own = ["'self'", "blob:"] if scripted else ["'self'"]
    urls = [urlsplit(url) for url in image_urls]
    image_sources = " ".join([*own, *sorted({f"{url.scheme}://{url.netloc}" for url in urls})])
    policy = (
        f"default-src 'none'; style-src 'self'; img-src {image_sources}; form-action 'self'; "
        "frame-ancestors 'none'; base-uri 'none'"
    )
    return {
        "content-security-policy": f"{policy}; script-src 'self'; connect-src 'self'" if scripted else policy,
        "cache-control": "no-store",
        "referrer-policy": "same-origin",
        "x-content-type-options": "nosniff",
    }


@get(f"{ASSETS_PATH}/{{name:str}}", include_in_schema=False, sync_to_thread=False)
def asset(name: FromPath[str]) -> File:
    """Serve a stylesheet, script or icon. Its URL on a page contains a version, so browsers may cache it forever."""
    if name not in ASSETS:
        raise NotFound(f"there is no asset {name}")
    headers = {"cache-control": "public, max-age=31536000, immutable", "x-content-type-options": "nosniff"}
    return File(_ASSETS_FOLDER / name, filename=name, content_disposition_type="inline", headers=headers)


def _assets_version() -> str:
    return hashlib.sha256(b"".join((_ASSETS_FOLDER / name).read_bytes() for name in ASSETS)).hexdigest()[:12]

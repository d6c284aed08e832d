"""The routes of the admin pages.

Pages need no JavaScript; a form that succeeds is answered with a redirect.
"""

from litestar import Router

from server.admin.job_list import job_list
from server.admin.job_page import cancel, job_page, resend, retry
from server.admin.sessions import ADMIN_PATH, cookie_session, require_session
from server.admin.sign_in import redirect_to_sign_in, sign_in, sign_in_page, sign_out
from server.media_types import forms_only
from zcore.errors import SignedOut

FORM_LIMIT_BYTES = 16 * 1024
"""A form holds a key or a token, and is parsed on the event loop."""


def admin_router(admin_key: str, public_url: str) -> Router:
    """Return the router of everything below `/admin`. Handlers that need no session declare `NO_SESSION_NEEDED`."""
    return Router(
        ADMIN_PATH,
        route_handlers=[sign_in_page, sign_in, sign_out, job_list, job_page, cancel, retry, resend],
        guards=[forms_only, require_session],
        middleware=[cookie_session(admin_key, public_url)],
        exception_handlers={SignedOut: redirect_to_sign_in},
        include_in_schema=False,
        request_max_body_size=FORM_LIMIT_BYTES,
    )

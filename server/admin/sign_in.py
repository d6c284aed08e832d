"""The sign-in page, and signing out."""

from collections.abc import Mapping
from typing import Any

from litestar import Request, Response, get, post
from litestar.response import Redirect, Template

from server.admin.rendering import render
from server.admin.sessions import (
    ADMIN_PATH,
    NO_SESSION_NEEDED,
    add_notice,
    end_session,
    is_signed_in,
    remember_destination,
    start_session,
)
from server.callers import Callers
from zcore.errors import SignedOut, TooManyWrongKeys

AnyRequest = Request[Any, Any, Any]


@get("/sign-in", opt={NO_SESSION_NEEDED: True})
async def sign_in_page(request: AnyRequest) -> Response[Any]:
    """Ask for the admin key, or redirect to the job list if the client is signed in."""
    return Redirect(ADMIN_PATH, status_code=303) if await is_signed_in(request) else _form(request)


@post("/sign-in", opt={NO_SESSION_NEEDED: True})
async def sign_in(request: AnyRequest) -> Response[Any]:
    """Start a session if the key is right. The application's `Callers` are in `state.callers`."""
    callers: Callers = request.app.state.callers
    try:
        is_right = callers.is_admin_key(request, str((await request.form()).get("key", "")))
    except TooManyWrongKeys as fault:
        error = f"Too many wrong keys. Try again in {fault.wait_s} s."
        return _form(request, error, status_code=429, headers={"retry-after": str(fault.wait_s)})
    if not is_right:
        return _form(request, "That is not the admin key.", status_code=403)
    return Redirect(await start_session(request), status_code=303)


@post("/sign-out")
async def sign_out(request: AnyRequest) -> Redirect:
    """End the session."""
    await end_session(request)
    add_notice(request, "You are signed out.")
    return Redirect(f"{ADMIN_PATH}/sign-in", status_code=303)


def redirect_to_sign_in(request: AnyRequest, _: SignedOut) -> Redirect:
    """Answer a request without a session: sign in first, then return to the requested page."""
    remember_destination(request)
    return Redirect(f"{ADMIN_PATH}/sign-in", status_code=303)


def _form(
    request: AnyRequest, error: str = "", *, status_code: int = 200, headers: Mapping[str, str] | None = None
) -> Template:
    return render(request, "sign_in.html", {"error": error}, status_code=status_code, headers=headers)

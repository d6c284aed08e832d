"""Access to the admin and security headers of pages, over HTTP without a browser."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from litestar.testing import TestClient

from server.app import create_app
from server.key_guesses import MAX_WRONG_KEYS, WINDOW_S
from server.problems import status_of
from tests.integration.installation import Installation
from tests.integration.jobs.examples import cancel, fetch, submit
from zcore.errors import SignedOut
from zcore.jobs.states import State

KEY = "0042004200420042"
OTHER_KEY = "0043004300430043"


@pytest.fixture
def installation(sqlite_url: str, tmp_path: Path) -> Installation:
    """An installation whose admin key could be mistaken for a number."""
    return Installation(tmp_path, {"database.url": sqlite_url, "server.admin_key": KEY})


@pytest.fixture
def visitor(installation: Installation) -> Iterator[httpx.Client]:
    """A client without a session."""
    with client_of(installation) as client:
        yield client


@pytest.fixture
def admin(visitor: httpx.Client) -> httpx.Client:
    """A client that is signed in."""
    assert submit_key(visitor, KEY).status_code == 303
    return visitor


def test_every_page_redirects_to_the_sign_in_page_without_a_session(visitor: httpx.Client) -> None:
    for path in ("/admin", "/admin?status=failed", "/admin/jobs/01234567-0123-7123-8123-0123456789ab"):
        answer = visitor.get(path)
        assert (answer.status_code, answer.headers["location"]) == (303, "/admin/sign-in"), path


def test_signing_in_returns_to_the_requested_page(visitor: httpx.Client) -> None:
    visitor.get("/admin?status=failed")
    assert submit_key(visitor, KEY).headers["location"] == "/admin?status=failed"


def test_a_long_address_does_not_fill_the_cookie(visitor: httpx.Client) -> None:
    """Its cookies would exceed the limit on headers, and so keep the browser out for twelve hours."""
    visitor.get("/admin?" + "x" * 50_000)
    assert sum(len(cookie.value or "") for cookie in visitor.cookies.jar) < 4096
    assert submit_key(visitor, KEY).headers["location"] == "/admin"


def test_a_missing_session_is_401_outside_the_admin() -> None:
    assert status_of(SignedOut("sign in first")) == 401


def test_actions_without_a_session_are_refused(visitor: httpx.Client, installation: Installation) -> None:
    with installation.database() as database:
        job = submit(database)
        token = token_of(visitor.get("/admin/sign-in"))
        answer = visitor.post(f"/admin/jobs/{job.id}/cancel", data={"form_token": token})
        assert (answer.status_code, answer.headers["location"]) == (303, "/admin/sign-in")
        assert fetch(database, job.id).status == State.QUEUED


@pytest.mark.parametrize("token", [None, "", "guessed"])
def test_a_form_without_a_valid_token_is_refused(
    admin: httpx.Client, installation: Installation, token: str | None
) -> None:
    with installation.database() as database:
        job = submit(database)
        answer = admin.post(f"/admin/jobs/{job.id}/cancel", data={} if token is None else {"form_token": token})
        assert answer.status_code == 403
        assert fetch(database, job.id).status == State.QUEUED


def test_a_form_token_of_another_session_is_refused(admin: httpx.Client, installation: Installation) -> None:
    with installation.database() as database, client_of(installation) as other:
        job = submit(database)
        submit_key(other, KEY)
        other_token = token_of(other.get("/admin"))
        assert admin.post(f"/admin/jobs/{job.id}/cancel", data={"form_token": other_token}).status_code == 403
        own_token = token_of(admin.get("/admin"))
        assert admin.post(f"/admin/jobs/{job.id}/cancel", data={"form_token": own_token}).status_code == 303
        assert fetch(database, job.id).status == State.CANCELED


def test_the_session_cookie_is_limited_to_the_admin(admin: httpx.Client) -> None:
    cookie = admin.get("/admin").headers["set-cookie"]
    assert {"HttpOnly", "SameSite=strict", "Path=/admin", "Max-Age=43200"} <= set(cookie.split("; "))
    assert "Secure" not in cookie


def test_with_an_https_public_url_the_cookie_is_secure(installation: Installation) -> None:
    with client_of(installation.changed(server__public_url="https://images.example")) as client:
        assert "Secure" in client.get("/admin/sign-in").headers["set-cookie"].split("; ")


def test_hosts_with_the_same_key_share_sessions_and_a_new_key_ends_them(
    admin: httpx.Client, installation: Installation
) -> None:
    session = admin.cookies["zimage_admin"]
    with client_of(installation, session) as same:
        assert same.get("/admin").status_code == 200
    with client_of(installation.changed(server__admin_key=OTHER_KEY), session) as changed:
        assert changed.get("/admin").status_code == 303
        # The stale cookie does not prevent signing in.
        assert submit_key(changed, OTHER_KEY).status_code == 303
        assert changed.get("/admin").status_code == 200


def test_a_session_ends_after_twelve_hours_despite_activity(
    admin: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + 7 * 3600)
    assert admin.get("/admin").status_code == 200
    monkeypatch.setattr("time.time", lambda: now + 13 * 3600)
    assert admin.get("/admin").status_code == 303


def test_after_five_wrong_keys_even_the_right_key_must_wait(visitor: httpx.Client) -> None:
    for number in range(MAX_WRONG_KEYS):
        assert submit_key(visitor, f"guess {number}").status_code == 403
    answer = submit_key(visitor, KEY)
    assert answer.status_code == 429
    assert 0 < int(answer.headers["retry-after"]) <= WINDOW_S
    assert f"Try again in {answer.headers['retry-after']} s." in answer.text


def test_a_client_that_was_signed_in_may_sign_in_again_during_an_attack(admin: httpx.Client) -> None:
    """Behind one address, a guesser cannot keep out who had the right key before."""
    assert admin.post("/admin/sign-out", data={"form_token": token_of(admin.get("/admin"))}).status_code == 303
    for number in range(MAX_WRONG_KEYS + 1):
        submit_key(admin, f"guess {number}")
    assert submit_key(admin, "another guess").status_code == 429
    assert submit_key(admin, KEY).status_code == 303


def test_signing_out_ends_copies_of_the_cookie_in_every_process(
    admin: httpx.Client, installation: Installation
) -> None:
    copied = admin.cookies["zimage_admin"]
    with client_of(installation, copied) as thief:
        assert thief.get("/admin").status_code == 200
        assert admin.post("/admin/sign-out", data={"form_token": token_of(admin.get("/admin"))}).status_code == 303
        assert thief.get("/admin").status_code == 303


def test_signing_out_leaves_other_sessions_open(admin: httpx.Client, installation: Installation) -> None:
    with client_of(installation) as other:
        submit_key(other, KEY)
        assert admin.post("/admin/sign-out", data={"form_token": token_of(admin.get("/admin"))}).status_code == 303
        assert other.get("/admin").status_code == 200


def test_whitespace_around_a_pasted_key_is_ignored(visitor: httpx.Client) -> None:
    assert submit_key(visitor, f" {KEY}\n").status_code == 303


def test_admin_pages_run_no_scripts_and_are_not_cached(admin: httpx.Client) -> None:
    for path in ("/admin", "/admin/sign-in", "/admin/nowhere"):
        headers = admin.get(path, follow_redirects=True).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "script-src" not in headers["content-security-policy"]
        assert headers["cache-control"] == "no-store"


def test_the_playground_is_public_and_runs_only_its_own_script(visitor: httpx.Client) -> None:
    page = visitor.get("/playground")
    assert page.status_code == 200
    assert "set-cookie" not in page.headers
    policy = set(page.headers["content-security-policy"].split("; "))
    assert {"default-src 'none'", "script-src 'self'", "connect-src 'self'", "frame-ancestors 'none'"} <= policy
    assert not re.search(r"<script(?! type=\"module\" src=)|<style| style=| on\w+=", page.text)
    [script] = re.findall(r'<script type="module" src="([^"]+)"', page.text)
    assert visitor.get(script).headers["content-type"].startswith("text/javascript")


def test_an_invalid_filter_is_answered_with_an_error_page(admin: httpx.Client) -> None:
    for query in ("status=done", "created_from=yesterday", "cursor=none", "newer=none"):
        answer = admin.get(f"/admin?{query}")
        assert answer.status_code == 400
        assert answer.headers["content-type"].startswith("text/html")


def test_the_api_does_not_use_the_admin_session(admin: httpx.Client, installation: Installation) -> None:
    """Errors of the API are not pages, and an admin session does not authenticate its calls."""
    answer = admin.get("/api/nowhere")
    assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")
    assert "set-cookie" not in answer.headers
    with client_of(
        installation.changed(server__api_keys={"anna": "anna-key-0123456789"}, server__keyless=False)
    ) as client:
        submit_key(client, KEY)
        assert client.post("/api/generate", json={"prompt": "x"}).status_code == 401
        accepted = client.post(
            "/api/generate", json={"prompt": "x"}, headers={"authorization": "Bearer anna-key-0123456789"}
        )
        assert accepted.status_code == 202


def test_resending_an_unknown_webhook_is_not_found(admin: httpx.Client, installation: Installation) -> None:
    with installation.database() as database:
        job = submit(database)
        cancel(database, job.id)
        token = token_of(admin.get("/admin"))
        address = f"/admin/jobs/{job.id}/webhooks/01234567-0123-7123-8123-0123456789ab/resend"
        answer = admin.post(address, data={"form_token": token})
    assert answer.status_code == 404
    assert answer.headers["content-type"].startswith("text/html")


@contextmanager
def client_of(installation: Installation, session: str | None = None) -> Iterator[httpx.Client]:
    """Run a server with these settings in this process, and yield a client of it."""
    app = create_app(installation.settings)
    # Over https, so that a Secure cookie is sent back.
    with TestClient(app, base_url="https://testserver.local") as client:
        client.follow_redirects = False
        if session is not None:
            client.cookies.set("zimage_admin", session, domain="testserver.local", path="/admin")
        yield client


def submit_key(client: httpx.Client, key: str) -> httpx.Response:
    """Submit the sign-in form."""
    return client.post("/admin/sign-in", data={"key": key, "form_token": token_of(client.get("/admin/sign-in"))})


def token_of(page: httpx.Response) -> str:
    """Return the token in the page's first form."""
    found = re.search(r'name="form_token" value="([^"]+)"', page.text)
    assert found is not None, page.text
    return found[1]

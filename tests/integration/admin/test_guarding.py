"""Who is let into the admin, and what a page may do: over HTTP, without a browser."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from litestar.testing import TestClient

from server.app import create_app
from server.sessions import REMEMBERED_CLIENTS, TRIES_AT_ONCE, TRY_AGAIN_AFTER_S, FailedTries
from tests.integration.installation import Installation
from tests.integration.jobs.examples import cancel, look, submit
from zcore.jobs.states import State

KEY = "00420042"


@pytest.fixture
def installation(sqlite_url: str, tmp_path: Path) -> Installation:
    """One with a key that could be taken for a number."""
    return Installation(tmp_path, {"database.url": sqlite_url, "server.admin_key": KEY})


@pytest.fixture
def visitor(installation: Installation) -> Iterator[httpx.Client]:
    """Somebody without a session."""
    with visiting(installation) as client:
        yield client


@pytest.fixture
def admin(visitor: httpx.Client) -> httpx.Client:
    """Somebody who signed in."""
    assert enter(visitor, KEY).status_code == 303
    return visitor


def test_every_page_sends_a_stranger_to_the_door(visitor: httpx.Client) -> None:
    for path in ("/admin", "/admin?status=failed", "/admin/jobs/01234567-0123-7123-8123-0123456789ab"):
        answer = visitor.get(path)
        assert (answer.status_code, answer.headers["location"]) == (303, "/admin/sign-in"), path


def test_every_deed_of_a_stranger_is_refused(visitor: httpx.Client, installation: Installation) -> None:
    with installation.database() as database:
        job = submit(database)
        token = token_of(visitor.get("/admin/sign-in"))
        answer = visitor.post(f"/admin/jobs/{job.id}/cancel", data={"form_token": token})
        assert (answer.status_code, answer.headers["location"]) == (303, "/admin/sign-in")
        assert look(database, job.id).status == State.QUEUED


@pytest.mark.parametrize("token", [None, "", "guessed"])
def test_a_form_of_elsewhere_is_refused(admin: httpx.Client, installation: Installation, token: str | None) -> None:
    with installation.database() as database:
        job = submit(database)
        answer = admin.post(f"/admin/jobs/{job.id}/cancel", data={} if token is None else {"form_token": token})
        assert answer.status_code == 403
        assert look(database, job.id).status == State.QUEUED


def test_a_token_of_another_session_is_refused(admin: httpx.Client, installation: Installation) -> None:
    with installation.database() as database, visiting(installation) as other:
        job = submit(database)
        enter(other, KEY)
        foreign = token_of(other.get("/admin"))
        assert admin.post(f"/admin/jobs/{job.id}/cancel", data={"form_token": foreign}).status_code == 403
        own = token_of(admin.get("/admin"))
        assert admin.post(f"/admin/jobs/{job.id}/cancel", data={"form_token": own}).status_code == 303
        assert look(database, job.id).status == State.CANCELED


def test_the_session_s_cookie_stays_in_the_admin(admin: httpx.Client) -> None:
    cookie = admin.get("/admin").headers["set-cookie"]
    assert {"HttpOnly", "SameSite=strict", "Path=/admin", "Max-Age=43200"} <= set(cookie.split("; "))
    assert "Secure" not in cookie


def test_behind_https_the_cookie_travels_by_https_alone(installation: Installation) -> None:
    with visiting(installation.changed(server__public_url="https://pictures.example")) as client:
        assert "Secure" in client.get("/admin/sign-in").headers["set-cookie"].split("; ")


def test_hosts_with_the_same_key_share_sessions_and_another_key_ends_them(
    admin: httpx.Client, installation: Installation
) -> None:
    session = admin.cookies["zimage_admin"]
    with visiting(installation, session) as same:
        assert same.get("/admin").status_code == 200
    with visiting(installation.changed(server__admin_key="00430043"), session) as changed:
        assert changed.get("/admin").status_code == 303
        # The stale cookie is in nobody's way.
        assert enter(changed, "00430043").status_code == 303
        assert changed.get("/admin").status_code == 200


def test_a_session_ends_after_twelve_hours_however_it_was_used(
    admin: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + 7 * 3600)
    assert admin.get("/admin").status_code == 200
    monkeypatch.setattr("time.time", lambda: now + 13 * 3600)
    assert admin.get("/admin").status_code == 303


def test_after_five_wrong_keys_the_right_one_has_to_wait_too(visitor: httpx.Client) -> None:
    for _ in range(TRIES_AT_ONCE):
        assert enter(visitor, "42").status_code == 403
    answer = enter(visitor, KEY)
    assert answer.status_code == 429
    assert 0 < int(answer.headers["retry-after"]) <= TRY_AGAIN_AFTER_S


def test_a_key_pasted_with_its_line_s_end_is_right(visitor: httpx.Client) -> None:
    assert enter(visitor, f" {KEY}\n").status_code == 303


def test_the_wait_ends_a_minute_after_the_first_wrong_key() -> None:
    now = 100.0
    tries = FailedTries(clock=lambda: now)
    for _ in range(TRIES_AT_ONCE):
        assert tries.wait_s("guesser") == 0
        tries.count("guesser")
        now += 1
    assert tries.wait_s("guesser") == TRY_AGAIN_AFTER_S - TRIES_AT_ONCE
    assert tries.wait_s("somebody else") == 0
    now = 100 + TRY_AGAIN_AFTER_S
    assert tries.wait_s("guesser") == 0
    tries.count("guesser")
    assert tries.wait_s("guesser") == 0


def test_many_guessers_do_not_fill_the_memory() -> None:
    now = 100.0
    tries = FailedTries(clock=lambda: now)
    for number in range(REMEMBERED_CLIENTS):
        tries.count(f"guesser {number}")
    now += TRY_AGAIN_AFTER_S
    tries.count("one more")
    assert len(tries._clients) == 1


def test_a_page_may_run_nothing_and_is_kept_nowhere(admin: httpx.Client) -> None:
    for path in ("/admin", "/admin/sign-in", "/admin/nowhere"):
        headers = admin.get(path, follow_redirects=True).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "script-src" not in headers["content-security-policy"]
        assert headers["cache-control"] == "no-store"


def test_the_playground_is_open_to_all_and_runs_its_own_script_alone(visitor: httpx.Client) -> None:
    page = visitor.get("/playground")
    assert page.status_code == 200
    assert "set-cookie" not in page.headers
    policy = set(page.headers["content-security-policy"].split("; "))
    assert {"default-src 'none'", "script-src 'self'", "connect-src 'self'", "frame-ancestors 'none'"} <= policy
    assert not re.search(r"<script(?! type=\"module\" src=)|<style| style=| on\w+=", page.text)
    [script] = re.findall(r'<script type="module" src="([^"]+)"', page.text)
    assert visitor.get(script).headers["content-type"].startswith("text/javascript")


def test_wrong_filters_are_a_page_that_names_them(admin: httpx.Client) -> None:
    for query in ("status=done", "created_from=yesterday", "cursor=none", "newer=none"):
        answer = admin.get(f"/admin?{query}")
        assert answer.status_code == 400
        assert answer.headers["content-type"].startswith("text/html")


def test_the_api_keeps_its_own_rules(admin: httpx.Client, installation: Installation) -> None:
    """No token, no cookie, no page: neither is the admin's session worth anything there."""
    answer = admin.get("/api/nowhere")
    assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")
    assert "set-cookie" not in answer.headers
    with visiting(installation.changed(server__api_keys={"anna": "secret"})) as client:
        enter(client, KEY)
        assert client.post("/api/generate", json={"prompt": "x"}).status_code == 401
        accepted = client.post("/api/generate", json={"prompt": "x"}, headers={"authorization": "Bearer secret"})
        assert accepted.status_code == 202


def test_a_webhook_is_not_sent_again_by_a_wrong_id(admin: httpx.Client, installation: Installation) -> None:
    with installation.database() as database:
        job = submit(database)
        cancel(database, job.id)
        token = token_of(admin.get("/admin"))
        address = f"/admin/jobs/{job.id}/webhooks/01234567-0123-7123-8123-0123456789ab/resend"
        answer = admin.post(address, data={"form_token": token})
    assert answer.status_code == 404
    assert answer.headers["content-type"].startswith("text/html")


@contextmanager
def visiting(installation: Installation, session: str | None = None) -> Iterator[httpx.Client]:
    """A client of a server with these settings, in this process."""
    app = create_app(installation.settings)
    # On https too, so that a Secure cookie comes back.
    with TestClient(app, base_url="https://testserver.local") as client:
        client.follow_redirects = False
        if session is not None:
            client.cookies.set("zimage_admin", session, domain="testserver.local", path="/admin")
        yield client


def enter(client: httpx.Client, key: str) -> httpx.Response:
    """Fill in the form at the door."""
    return client.post("/admin/sign-in", data={"key": key, "form_token": token_of(client.get("/admin/sign-in"))})


def token_of(page: httpx.Response) -> str:
    """The token in the page's first form."""
    found = re.search(r'name="form_token" value="([^"]+)"', page.text)
    assert found is not None, page.text
    return found[1]

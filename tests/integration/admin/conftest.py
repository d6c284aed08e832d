"""Fixtures: a real server process with its pages, and a browser whose errors fail the test."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Page, Response, expect

from tests.integration.installation import Installation
from tests.integration.jobs.examples import RETENTION_S, claim, empty, stored_image, submit
from tests.services import browser as browsers
from tests.services.postgres import Postgres
from tests.waiting import wait_until
from zcore.jobs import lifecycle, queries
from zcore.jobs.claims import Lease
from zcore.jobs.database import Database
from zcore.jobs.lifecycle import StoredOutput
from zcore.jobs.models import AdminSession, Job
from zcore.keys import load_keys
from zcore.storage import Storage, open_storage

ADMIN_KEY = "the-key-of-these-tests"


@dataclass(frozen=True)
class Served:
    """A running server with its database, storage and broker folder."""

    url: str
    database: Database
    storage: Storage
    notifications: Path  # the folder that receives the broker's messages


@pytest.fixture(scope="module")
def server(postgres: Postgres, migrated_template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The server of one test module, on PostgreSQL. No worker runs, so jobs do not change on their own."""
    folder = tmp_path_factory.mktemp("admin")
    with postgres.database(migrated_template) as database_url:
        installation = Installation(folder, {"database.url": database_url, "server.admin_key": ADMIN_KEY})
        storage = open_storage(installation.settings, load_keys(installation.settings).link)
        with installation.serving() as running, installation.database() as database:
            yield Served(running.url, database, storage, folder / "broker" / "queue")


@pytest.fixture
def admin(server: Served) -> Iterator[Served]:
    """The server with an empty database."""
    yield server
    empty(server.database, AdminSession)


@pytest.fixture
def browser_errors() -> list[str]:
    """Errors that the browser reported; a test removes those that it expects."""
    return []


@pytest.fixture
def anonymous_page(admin: Served, browser_page: Page, browser_errors: list[str]) -> Iterator[Page]:
    """A browser page that has not signed in.

    Content policy violations, script errors and failed requests fail the test.
    """

    def listen(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            browser_errors.append(message.text)

    def check(response: Response) -> None:
        if response.status >= 400:
            browser_errors.append(f"{response.status} {response.request.method} {response.url}")

    browser_page.on("console", listen)
    browser_page.on("pageerror", lambda error: browser_errors.append(str(error)))
    browser_page.on("response", check)
    yield browser_page
    assert browser_errors == []


@pytest.fixture(scope="module")
def session(server: Served, browser: Browser) -> str:
    """The cookie of a signed-in session."""
    with browsers.page(browser) as page:
        page.goto(f"{server.url}/admin")
        sign_in(page, ADMIN_KEY)
        expect(page).to_have_url(f"{server.url}/admin")
        [cookie] = page.context.cookies(f"{server.url}/admin")
        return cookie["value"]


@pytest.fixture
def page(admin: Served, anonymous_page: Page, session: str) -> Page:
    """A signed-in browser page that shows the job list."""
    anonymous_page.context.add_cookies(
        [{"name": "zimage_admin", "value": session, "domain": "127.0.0.1", "path": "/admin", "httpOnly": True}]
    )
    anonymous_page.goto(f"{admin.url}/admin")
    return anonymous_page


def sign_in(page: Page, key: str) -> None:
    """Submit a key on the sign-in page."""
    page.get_by_label("Admin key").fill(key)
    page.get_by_role("button", name="Sign in").click()


def succeeded_job(admin: Served, retention_s: float = RETENTION_S, n: int = 1, **fields: object) -> Job:
    """Create a succeeded job with its images in storage."""
    submit(admin.database, n=n, **fields)
    return complete(admin, claim(admin.database), retention_s, n)


def complete(
    admin: Served, lease: Lease, retention_s: float = RETENTION_S, n: int = 1, engine: dict[str, str] | None = None
) -> Job:
    """Complete the lease's job in place of a worker."""
    content = io.BytesIO()
    Image.linear_gradient("L").resize((64, 64)).save(content, "PNG")
    outputs: list[StoredOutput] = []
    for position in range(n):
        key = f"jobs/{lease.job_id}/1-{position}.png"
        admin.storage.put(key, content.getvalue(), "image/png")
        example = stored_image(position)
        outputs.append(StoredOutput(position, key, "png", 64, 64, len(content.getvalue()), "a" * 64, example.seed))
    with admin.database.write() as transaction:
        lifecycle.complete(transaction, lease, outputs, {"total_ms": 5}, engine or {"device": "cpu"}, retention_s)
        return queries.get(transaction, lease.job_id)


def natural_widths(page: Page, selector: str) -> list[int]:
    """Return the natural widths of the matching images once all of them are loaded."""
    expect(page.locator(selector).first).to_be_visible()
    loaded = "images => images.every(image => image.complete) && images.map(image => image.naturalWidth)"
    return wait_until(lambda: page.locator(selector).evaluate_all(loaded))

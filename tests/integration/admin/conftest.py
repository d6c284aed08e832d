"""A real server process with its pages, and a browser that minds every complaint."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Page, Response, expect
from sqlalchemy import delete

from tests.integration.installation import Installation
from tests.integration.jobs.examples import RETENTION_S, claim, picture, submit
from tests.services import browser as browsers
from tests.services.postgres import Postgres
from tests.waiting import wait_until
from zcore.jobs import lifecycle, queries
from zcore.jobs.database import Database
from zcore.jobs.lifecycle import Lease, StoredOutput
from zcore.jobs.models import Job, Worker
from zcore.keys import load_keys
from zcore.storage import Storage, open_storage

ADMIN_KEY = "the-key-of-these-tests"


@dataclass(frozen=True)
class Served:
    """A running server, and what lies behind it."""

    url: str
    database: Database
    storage: Storage
    bell: Path  # the folder where rings of the doorbell arrive


@pytest.fixture(scope="module")
def server(postgres: Postgres, migrated_template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The server of this file's tests, on PostgreSQL. No worker runs, so jobs stay as the test left them."""
    folder = tmp_path_factory.mktemp("admin")
    with postgres.database(migrated_template) as database_url:
        installation = Installation(folder, {"database.url": database_url, "server.admin_key": ADMIN_KEY})
        storage = open_storage(installation.settings, load_keys(installation.settings).link)
        with installation.serving() as running, installation.database() as database:
            yield Served(running.url, database, storage, folder / "broker" / "queue")


@pytest.fixture
def admin(server: Served) -> Iterator[Served]:
    """The server with an empty record."""
    yield server
    with server.database.write() as transaction:
        transaction.session.execute(delete(Job))
        transaction.session.execute(delete(Worker))


@pytest.fixture
def complaints() -> list[str]:
    """What the browser complained of; a test takes out what it provoked."""
    return []


@pytest.fixture
def stranger(admin: Served, browser_page: Page, complaints: list[str]) -> Iterator[Page]:
    """A browser that has not signed in. Violations of the content policy, scripts' errors and failed requests are
    complaints, and the test fails by them.
    """

    def listen(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            complaints.append(message.text)

    def look(response: Response) -> None:
        if response.status >= 400:
            complaints.append(f"{response.status} {response.request.method} {response.url}")

    browser_page.on("console", listen)
    browser_page.on("pageerror", lambda error: complaints.append(str(error)))
    browser_page.on("response", look)
    yield browser_page
    assert complaints == []


@pytest.fixture(scope="module")
def session(server: Served, browser: Browser) -> str:
    """The cookie of somebody who signed in."""
    with browsers.page(browser) as page:
        page.goto(f"{server.url}/admin")
        sign_in(page, ADMIN_KEY)
        expect(page).to_have_url(f"{server.url}/admin")
        [cookie] = page.context.cookies(f"{server.url}/admin")
        return cookie["value"]


@pytest.fixture
def page(admin: Served, stranger: Page, session: str) -> Page:
    """A browser that is signed in, at the jobs."""
    stranger.context.add_cookies(
        [{"name": "zimage_admin", "value": session, "domain": "127.0.0.1", "path": "/admin", "httpOnly": True}]
    )
    stranger.goto(f"{admin.url}/admin")
    return stranger


def sign_in(page: Page, key: str) -> None:
    """Give a key at the sign-in page."""
    page.get_by_label("Admin key").fill(key)
    page.get_by_role("button", name="Sign in").click()


def painted(admin: Served, retention_s: float = RETENTION_S, n: int = 1, **fields: object) -> Job:
    """A job that succeeded, its pictures in storage."""
    submit(admin.database, n=n, **fields)
    return paint(admin, claim(admin.database), retention_s, n)


def paint(admin: Served, lease: Lease, retention_s: float = RETENTION_S, n: int = 1) -> Job:
    """The lease's job as a worker ends it."""
    content = io.BytesIO()
    Image.linear_gradient("L").resize((64, 64)).save(content, "PNG")
    outputs: list[StoredOutput] = []
    for position in range(n):
        key = f"jobs/{lease.job_id}/1-{position}.png"
        admin.storage.put(key, content.getvalue(), "image/png")
        example = picture(position)
        outputs.append(StoredOutput(position, key, "png", 64, 64, len(content.getvalue()), "a" * 64, example.seed))
    with admin.database.write() as transaction:
        lifecycle.complete(transaction, lease, outputs, {"total_ms": 5}, {"device": "cpu"}, retention_s)
        return queries.get(transaction, lease.job_id)


def natural_widths(page: Page, selector: str) -> list[int]:
    """How wide the pictures are that have been loaded and understood."""
    expect(page.locator(selector).first).to_be_visible()
    loaded = "images => images.every(image => image.complete) && images.map(image => image.naturalWidth)"
    return wait_until(lambda: page.locator(selector).evaluate_all(loaded))

"""A real browser for tests: an installed Chromium, or Debian's package if root can install it, or Playwright's.

    python -m tests.services.browser        find one, or install one; `make test` runs this first

Its pages can reach only this machine.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, Page, sync_playwright

from tests.services import debian

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
]  # fmt: skip


@contextmanager
def running() -> Iterator[Browser]:
    """Yield a browser process.

    Playwright runs an event loop in this thread until the end, so `asyncio.run` is not possible meanwhile.
    """
    with sync_playwright() as playwright:
        program = installed() or playwright.chromium.executable_path
        if not os.path.exists(program):
            raise RuntimeError("the browser is missing: run `python -m tests.services.browser`, as `make test` does")
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def page(browser: Browser) -> Iterator[Page]:
    """Yield a page without cookies or history."""
    context = browser.new_context()
    context.set_default_timeout(20_000)
    try:
        yield context.new_page()
    finally:
        context.close()


def installed() -> str | None:
    """Return the path of the Chromium of this machine, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def install() -> None:
    """Install a browser if there is none. Raises `CalledProcessError` if no way works."""
    if installed():
        return
    debian.install("chromium")
    if installed():
        return
    subprocess.run([sys.executable, "-m", "playwright", "install", "chromium"], stdin=subprocess.DEVNULL, check=True)


if __name__ == "__main__":
    install()

"""A real browser for tests: an installed Chromium, else Debian's package where root may install it, else Playwright's.

    python -m tests.services.browser        find one, or install one; `make test` runs this first

Gives pages that reach nothing but this machine.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
]  # fmt: skip


@contextmanager
def running() -> Iterator[Browser]:
    """A browser process. Playwright keeps an event loop in this thread until the end: no `asyncio.run` meanwhile."""
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
    """A page without cookies or history."""
    context = browser.new_context()
    context.set_default_timeout(20_000)
    try:
        yield context.new_page()
    finally:
        context.close()


def installed() -> str | None:
    """The Chromium of this machine."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def install() -> None:
    """See to it that there is one. Raises `CalledProcessError` when no way works."""
    if installed():
        return
    if os.geteuid() == 0 and shutil.which("apt-get"):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "--yes", "--no-install-recommends", "chromium"]):
            subprocess.run(["apt-get", "--quiet", *command], env=environment, stdin=subprocess.DEVNULL, check=False)
        if installed():
            return
    subprocess.run([sys.executable, "-m", "playwright", "install", "chromium"], stdin=subprocess.DEVNULL, check=True)


if __name__ == "__main__":
    install()

"""The server's edge: reads settings, once, and makes the application. `uvicorn --factory server.asgi:make`."""

import os

from litestar import Litestar

from server.app import create_app
from zcore.settings import load_settings
from zcore.telemetry import configure_logging


def make() -> Litestar:
    """The application of this process's environment."""
    settings = load_settings(os.environ)
    configure_logging(settings.log, "server")
    return create_app(settings)

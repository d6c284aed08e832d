"""ASGI entry point: reads the settings and creates the application.

Run it with `uvicorn --factory server.asgi:make`. Only `python -m server` limits connections (`server.connections`).
"""

import os

from server.app import create_app
from server.edge import Edge
from zcore.data_folder import UMASK, make_private
from zcore.settings import load_settings
from zcore.telemetry import configure_logging


def make() -> Edge:
    """Create the application from this process's environment."""
    settings = load_settings(os.environ)
    configure_logging(settings.log, "server")
    os.umask(UMASK)
    app = create_app(settings)
    make_private(settings)
    return Edge(app, settings.server, app.state.drain)

"""`python -m server`: the API under uvicorn. Keys of the settings may be arguments: `python -m server
server.port=9000`.
"""

import contextlib
import os
import sys
from types import FrameType

import uvicorn

from server.app import create_app
from server.watch import Watch
from zcore.errors import ZImageError
from zcore.settings import load_settings, overrides_from_arguments
from zcore.telemetry import configure_logging


def main() -> None:
    """Serves until SIGTERM or Ctrl-C; requests under way are finished. Status 2 and one line when it cannot start."""
    try:
        settings = load_settings(os.environ, overrides_from_arguments(sys.argv[1:]))
        configure_logging(settings.log, "server")
        app = create_app(settings)
    except ZImageError as fault:
        print(f"server: {fault.message}", file=sys.stderr)
        raise SystemExit(2) from None
    config = uvicorn.Config(
        app,
        host=settings.server.host,
        port=settings.server.port,
        # uvicorn waits for open streams without end unless told how long.
        timeout_graceful_shutdown=settings.server.shutdown_grace_s,
        # Who called is decided by the connection, not by headers that anybody can send.
        proxy_headers=False,
        access_log=False,
        log_config=None,
    )
    server = _Server(config, app.state.watch)
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    if not server.started:
        raise SystemExit(1)


class _Server(uvicorn.Server):
    """uvicorn, which on SIGTERM answers at once those who wait for a job."""

    def __init__(self, config: uvicorn.Config, watch: Watch) -> None:
        super().__init__(config)
        self._watch = watch

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._watch.release()
        super().handle_exit(sig, frame)


main()

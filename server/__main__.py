"""`python -m server`: run the API under uvicorn.

Settings may be given as arguments: `python -m server server.port=9000`.
"""

import contextlib
import os
import shlex
import sys

import uvicorn

from server.app import create_app
from server.connections import configure
from zcore.data_folder import UMASK, make_private
from zcore.errors import ZImageError
from zcore.keys import api_key_file
from zcore.settings import load_settings, overrides_from_arguments
from zcore.telemetry import configure_logging


def main() -> None:
    """Serve until Ctrl-C, or SIGTERM and the drain that follows it, then finish the requests in progress.

    Exits with status 2 and one line on stderr if the settings are wrong, and with status 1 if the server cannot start.
    """
    try:
        settings = load_settings(os.environ, overrides_from_arguments(sys.argv[1:]))
        configure_logging(settings.log, "server")
        os.umask(UMASK)
        app = create_app(settings)
        make_private(settings)
    except ZImageError as error:
        print(f"server: {error.message}", file=sys.stderr)
        raise SystemExit(2) from None
    if (key_file := api_key_file(settings)) is not None:
        print(
            f"server: no API keys are configured, so callers need the generated one: "
            f'curl {settings.public_url}/api/jobs -H "Authorization: Bearer $(cat {shlex.quote(str(key_file))})"',
            file=sys.stderr,
        )
    server = uvicorn.Server(configure(app, settings))
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    if not server.started:
        raise SystemExit(1)


main()

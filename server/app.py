"""The server's only wiring: settings in, the Litestar application out.

Makes each part once and gives it to handlers by name. Loads no torch. Does not read the environment: `asgi` does.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from litestar import Litestar, Request, Router
from litestar.datastructures import State
from litestar.di import Provide
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin
from litestar.openapi.spec import Components, SecurityScheme, Server
from litestar.types import ControllerRouterHandler

from server.auth import Callers
from server.limits import PromptLimit
from server.pages import admin_routes, answer_people, template_config
from server.playground import playground
from server.problems import EXCEPTION_HANDLERS
from server.routes import files, health, inputs, jobs, loras, prompts, sizes
from server.watch import Watch
from zcore.broker import Doorbell, make_app
from zcore.errors import StorageError
from zcore.jobs.database import Database
from zcore.keys import load_keys
from zcore.settings import Settings
from zcore.storage import open_storage
from zcore.telemetry import log

BODY_LIMIT_BYTES = 1024 * 1024
ROUTES: list[ControllerRouterHandler] = [
    health.live,
    health.ready,
    jobs.generate,
    jobs.list_jobs,
    jobs.get_job,
    jobs.cancel_job,
    jobs.get_output,
    prompts.list_templates,
    prompts.get_template,
    prompts.format_prompt,
    sizes.list_sizes,
    files.file,
]


def create_app(settings: Settings) -> Litestar:
    """The application of these settings.

    Raises `ZImageError` where they cannot work; connects to nothing yet but storage. `state.watch` is the `Watch` that
    holds waiting requests, `state.callers` and `state.admin_key` what the guards of `auth` ask for.
    """
    keys = load_keys(settings)
    database = Database(settings.database_url, settings.database.pool_size)
    storage = open_storage(settings, keys.link)
    try:
        storage.prepare()
    except StorageError as fault:
        # Jobs are accepted without it; workers prepare it too.
        log.warning("storage.unreachable", error=fault.message)
    callers = Callers(settings.server)
    doorbell = Doorbell(make_app(settings))

    def owner(request: Request[Any, Any, Any]) -> str:
        return callers.owner(request)

    @asynccontextmanager
    async def lifespan(_: Litestar) -> AsyncGenerator[None]:
        yield
        doorbell.close()
        database.close()

    watch = Watch(database)
    parts = {
        "settings": settings,
        "database": database,
        "storage": storage,
        "doorbell": doorbell,
        "prompt_limit": PromptLimit.load(settings.templates_paths, settings.model_location),
        "watch": watch,
        "opening": asyncio.Semaphore(inputs.OPENED_AT_ONCE),
    }
    return Litestar(
        [
            *ROUTES,
            playground,
            Router("/", route_handlers=[inputs.upload], request_max_body_size=settings.limits.max_input_bytes),
            Router(
                "/",
                route_handlers=[loras.list_loras, loras.register_lora, loras.remove_lora],
                request_max_body_size=settings.lora.max_bytes,
            ),
            *admin_routes(keys.admin, settings.public_url),
        ],
        dependencies={
            **{name: _same(part) for name, part in parts.items()},
            "owner": Provide(owner, sync_to_thread=False),
        },
        exception_handlers=answer_people(EXCEPTION_HANDLERS),
        template_config=template_config(),
        lifespan=[lifespan],
        state=State({"watch": watch, "callers": callers, "admin_key": keys.admin}),
        request_max_body_size=BODY_LIMIT_BYTES,
        openapi_config=_openapi(settings),
        logging_config=None,  # `zcore.telemetry` has configured it
    )


def _same(part: object) -> Provide:
    return Provide(lambda: part, sync_to_thread=False)


def _openapi(settings: Settings) -> OpenAPIConfig:
    return OpenAPIConfig(
        title="Z-Image service",
        version="0.1.0",
        description="Submit a prompt, follow the job, fetch the picture; or be told by a signed webhook.",
        path="/schema",
        render_plugins=[JsonRenderPlugin()],
        servers=[Server(settings.public_url)],
        components=Components(security_schemes={"key": SecurityScheme(type="http", scheme="bearer")}),
        security=[{"key": []}],
    )

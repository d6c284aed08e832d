"""The server's composition root: settings in, the Litestar application out.

Creates each component once and injects it into handlers by name. Imports no torch. Does not read the environment;
`asgi` and `__main__` do.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from litestar import Litestar, Request, Router
from litestar.datastructures import State
from litestar.di import Provide
from litestar.types import ControllerRouterHandler

from server.admin.formatting import FILTERS
from server.admin.rendering import with_error_pages
from server.admin.router import admin_router
from server.bodies import BodyRequest
from server.callers import Caller, Callers, caller_of
from server.drain import Drain
from server.key_guesses import KeyGuesses
from server.openapi import openapi_config
from server.pages import asset, template_config
from server.parameters import strict_query
from server.problems import EXCEPTION_HANDLERS
from server.prompt_check import PromptCheck
from server.routes import files, health, inputs, jobs, loras, prompts, sizes
from server.routes.playground import playground
from server.routes.start import reference, start
from server.storage_preparation import prepare_in_background
from server.submission import Submissions
from server.threads import Threads
from server.watch import Watch
from zcore.broker import Notifier, make_app
from zcore.checkpoint.defaults import generation_defaults
from zcore.checkpoint.trained_size import trained_side_here
from zcore.jobs.database import Database
from zcore.keys import load_keys
from zcore.settings import Settings
from zcore.storage import open_storage

BODY_LIMIT_BYTES = 1024 * 1024
ROUTES: list[ControllerRouterHandler] = [
    health.check_liveness,
    health.check_readiness,
    jobs.submit_job,
    jobs.list_jobs,
    jobs.get_job,
    jobs.cancel_job,
    jobs.get_output,
    prompts.list_templates,
    prompts.get_template,
    prompts.format_prompt,
    sizes.list_sizes,
    files.get_file,
    playground,
    start,
    reference,
    asset,
]


def create_app(settings: Settings) -> Litestar:
    """Create the application for these settings.

    Only the storage is contacted here; every other connection is made on first use. `state.drain` is for
    `server.edge`; guards use `state.callers` and `state.database`.
    Raises `ZImageError` if the settings cannot work.
    """
    keys = load_keys(settings)
    database = Database(settings.database_url, settings.database.pool_size)
    storage = open_storage(settings, keys.link)
    stop_preparing = prepare_in_background(storage)
    callers = Callers(keys.api, keys.admin, KeyGuesses())
    notifier = Notifier(make_app(settings))
    prompt_check = PromptCheck.load(settings.templates_paths, settings.model_location)
    watch = Watch(database)
    drain = Drain(settings.server.drain_s, on_begin=watch.release)
    threads = Threads.create(settings.database.pool_size)

    @asynccontextmanager
    async def lifespan(_: Litestar) -> AsyncGenerator[None]:
        threads.use_by_default()
        with drain.delaying_signals():
            yield
        stop_preparing()
        threads.close()
        notifier.close()
        database.close()

    components = {
        "settings": settings,
        "defaults": generation_defaults(settings),
        "trained_px": trained_side_here(settings.model_location),
        "database": database,
        "drain": drain,
        "storage": storage,
        "notifier": notifier,
        "prompt_check": prompt_check,
        "submissions": Submissions(settings, database, storage, notifier, prompt_check, watch, threads),
        "threads": threads,
        "upload_slots": asyncio.Semaphore(inputs.MAX_CONCURRENT_DECODES),
    }
    app = Litestar(
        [
            *ROUTES,
            Router("/", route_handlers=[inputs.upload_input], request_max_body_size=settings.limits.max_input_bytes),
            Router(
                "/",
                route_handlers=[loras.list_loras, loras.register_lora, loras.remove_lora],
                request_max_body_size=settings.lora.max_bytes,
            ),
            admin_router(keys.admin, settings.public_url),
        ],
        dependencies={
            **{name: _constant(component) for name, component in components.items()},
            "caller": Provide(_caller_of, sync_to_thread=False),
        },
        guards=[strict_query],
        request_class=BodyRequest,
        exception_handlers=with_error_pages(EXCEPTION_HANDLERS),
        template_config=template_config(FILTERS),
        lifespan=[lifespan],
        state=State({"drain": drain, "callers": callers, "database": database, "threads": threads}),
        request_max_body_size=BODY_LIMIT_BYTES,
        openapi_config=openapi_config(settings, lambda: app.routes),
        logging_config=None,  # `zcore.telemetry` configures logging
    )
    return app


def _caller_of(request: Request[Any, Any, Any]) -> Caller:
    return caller_of(request)


def _constant(value: object) -> Provide:
    return Provide(lambda: value, sync_to_thread=False)

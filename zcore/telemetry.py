"""Structured logs: events with fields, one line each, on standard error.

`log` writes an event; `bound()` adds fields such as the job's id to every event of a block. Prompts are not logged.
"""

import logging
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import structlog

from zcore.foreign_text import printable
from zcore.settings import LogSettings

log: structlog.stdlib.BoundLogger = structlog.get_logger("zimage")


def configure_logging(settings: LogSettings, process: str) -> None:
    """Write this process's events, and the warnings of libraries, to standard error in the configured format."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    last = (
        [structlog.processors.JSONRenderer()]
        if settings.format == "json"
        else [_printable_fields, structlog.dev.ConsoleRenderer(colors=False)]
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last]
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.root.handlers = [handler]
    logging.root.setLevel(logging.WARNING)
    logging.getLogger("zimage").setLevel(settings.level.upper())
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        # A cached logger would keep the processors of its first use when a process is configured again.
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.bind_contextvars(process=process)


def _printable_fields(_logger: Any, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Escape control characters, which callers can put into paths and names; a traceback keeps its lines."""
    return {
        name: "\n".join(map(printable, value.split("\n") if name == "exception" else [value]))
        if isinstance(value, str)
        else value
        for name, value in event.items()
    }


@contextmanager
def bound(**fields: Any) -> Generator[None]:
    """Add these fields to every event inside the block."""
    with structlog.contextvars.bound_contextvars(**fields):
        yield

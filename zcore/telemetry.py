"""Structured logs: events with fields, on standard error, one line each.

Takes the log settings; gives `log` and `bound()`, which puts fields such as the job's id on every line of a block.
No prompts in logs. Does not know who reads them.
"""

import logging
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import structlog

from zcore.settings import LogSettings

log: structlog.stdlib.BoundLogger = structlog.get_logger("zimage")


def configure_logging(settings: LogSettings, process: str) -> None:
    """Sends this process's events, and the warnings of libraries, to standard error in the chosen format."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    last = (
        structlog.processors.JSONRenderer()
        if settings.format == "json"
        else structlog.dev.ConsoleRenderer(colors=False)
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, last]
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
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(process=process)


@contextmanager
def bound(**fields: Any) -> Generator[None]:
    """Every event inside the block carries these fields."""
    with structlog.contextvars.bound_contextvars(**fields):
        yield

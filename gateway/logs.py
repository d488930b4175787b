"""Structured logs: one line an event on standard error, text for people, JSON for machines."""

import logging
import sys
from collections.abc import Callable, MutableMapping
from typing import Any

import structlog


def configure_logging(level: str, redact: Callable[[str], str]) -> None:
    """Send our logs and those of the libraries through one formatter.

    Args:
        level: least severe level that is written.
        redact: applied to every string of every event, so that an exception's text cannot carry what a user typed.
    """

    def redact_event(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        return {key: redact(value) if isinstance(value, str) else value for key, value in event.items()}

    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    people = sys.stderr.isatty()
    renderer: Any = structlog.dev.ConsoleRenderer() if people else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, redact_event, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Their ordinary traffic is not news: a line a request, a job or a poll would bury what is.
    for noisy in ("httpx", "httpx2", "httpcore", "alembic", "procrastinate", "mlflow", "openai", "psycopg.pool"):
        logging.getLogger(noisy).setLevel(logging.WARNING)

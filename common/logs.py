"""Logs: one event a line, for people on a terminal and as JSON elsewhere. Texts and secrets are never logged."""

from __future__ import annotations

import logging
import sys

import structlog
from structlog.typing import Processor

from common.settings import LogSettings


def set_up_logs(settings: LogSettings, process: str) -> None:
    """Sets logging up for a process that calls itself `process`, for structlog and for libraries alike."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    level = getattr(logging, settings.level.upper())
    structlog.configure(
        processors=[*shared, _renderer(settings)],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(process=process)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _renderer(settings)],
            foreign_pre_chain=shared,
        )
    )
    logging.basicConfig(handlers=[handler], level=max(level, logging.WARNING), force=True)


def logger() -> structlog.typing.FilteringBoundLogger:
    """The log to write to."""
    log: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return log


def _renderer(settings: LogSettings) -> Processor:
    for_people = settings.format == "console" or (settings.format == "auto" and sys.stderr.isatty())
    return structlog.dev.ConsoleRenderer() if for_people else structlog.processors.JSONRenderer()

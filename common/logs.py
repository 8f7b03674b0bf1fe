"""Logs: one event a line, for people on a terminal and as JSON elsewhere. Texts and secrets are never logged."""

from __future__ import annotations

import asyncio
import atexit
import itertools
import logging
import sys
import time
from datetime import UTC, datetime
from functools import partial
from typing import Any, BinaryIO

import orjson
import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from common.settings import LogSettings

_LOG: structlog.typing.FilteringBoundLogger = structlog.get_logger()
"""One for all: each that `get_logger` gives would be assembled again at its first event."""
_lines: _Lines | None = None
"""Where `log_often` writes; None: through the log, as all others."""
FLUSH_SECONDS = 0.1
MOST_WAITING = 1000


def set_up_logs(settings: LogSettings, process: str) -> None:
    """Sets logging up for a process that calls itself `process`, for structlog and for libraries alike."""
    for_people = settings.format == "console" or (settings.format == "auto" and sys.stderr.isatty())
    shared: list[Processor] = [
        partial(_name_process, process),
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    level = getattr(logging, settings.level.upper())
    structlog.configure(
        processors=[*shared, _renderer(for_people)],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=(
            structlog.WriteLoggerFactory(sys.stderr) if for_people else structlog.BytesLoggerFactory(sys.stderr.buffer)
        ),
        cache_logger_on_first_use=True,
    )
    global _lines
    _lines = None if for_people or level > logging.INFO else _Lines(sys.stderr.buffer, process)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _renderer(for_people), _as_text],
            foreign_pre_chain=shared,
        )
    )
    logging.basicConfig(handlers=[handler], level=max(level, logging.WARNING), force=True)


def logger() -> structlog.typing.FilteringBoundLogger:
    """The log to write to."""
    return _LOG


def log_often(event: str, fields: dict[str, Any]) -> None:
    """An event of level info that every call has, from the event loop. `fields`: becomes the line.

    As JSON it is written here: with structlog's chain of processors the same line took a fifth of a hit's Python.
    """
    if _lines is None:
        _LOG.info(event, **fields)
    else:
        _lines.add(event, fields)


class _Lines:
    """Lines of JSON that go out together, a moment later: one at a time they took a fifth of a hit's time.

    Who is killed takes the last moment's lines along.
    """

    def __init__(self, out: BinaryIO, process: str) -> None:
        self._out = out
        self._process = process
        self._waiting: list[tuple[float, str, dict[str, Any]]] = []
        atexit.register(self.flush)

    def add(self, event: str, fields: dict[str, Any]) -> None:
        """A line of this moment."""
        if not self._waiting:
            asyncio.get_running_loop().call_later(FLUSH_SECONDS, self.flush)
        self._waiting.append((time.time(), event, fields))
        if len(self._waiting) >= MOST_WAITING:
            self.flush()

    def flush(self) -> None:
        """Writes what there is."""
        waiting, self._waiting = self._waiting, []
        self._out.write(b"".join(itertools.starmap(self._line, waiting)))
        self._out.flush()

    def _line(self, moment: float, event: str, fields: dict[str, Any]) -> bytes:
        at = datetime.fromtimestamp(moment, UTC)
        line = fields | {"event": event, "process": self._process, "level": "info", "timestamp": at}
        return orjson.dumps(line, default=repr, option=orjson.OPT_UTC_Z | orjson.OPT_APPEND_NEWLINE)


def _renderer(for_people: bool) -> Processor:
    if for_people:
        return structlog.dev.ConsoleRenderer()
    return structlog.processors.JSONRenderer(serializer=orjson.dumps)


def _name_process(process: str, logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    event["process"] = process
    return event


def _as_text(logger: WrappedLogger, method: str, line: EventDict) -> str:
    """What the libraries' handler writes. The renderer has made one line of the event already."""
    return line.decode() if isinstance(line, bytes) else str(line)

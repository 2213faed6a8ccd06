"""Logs as lines of JSON on standard error, and the W3C trace context that a call carries through everything.

Every line that is written while a call is served carries its trace, tenant, user and method, and whatever was added by
`annotate` (the command id, for one). Nothing here logs a request's content or a token, and nobody else may.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import random
import re
import sys
from collections.abc import MutableMapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, BinaryIO, cast

import orjson
import structlog

from shared.identity import current_call

_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")
_NO_TRACE = "0" * 32
_NO_SPAN = "0" * 16
_MOMENT_S = 0.02
_random = random.Random()  # noqa: S311 (of no secret)

# What `annotate` adds to. The server gives each call a fresh one; outside of calls there is none.
call_facts: ContextVar[dict[str, str | float]] = ContextVar("call_facts")


def configure(level: str = "info", *, service: str, stream: BinaryIO | None = None) -> None:
    """Sets up logging of the process, once, at its start. `service` is in every line."""
    level_number = logging.getLevelNamesMapping()[level.upper()]
    lines = _Lines(stream or sys.stderr.buffer)
    atexit.register(lines.write_out)
    structlog.configure(
        # One processor: there is a line for every call, and each further one was felt there.
        processors=[_Line(service, lines)],
        wrapper_class=structlog.make_filtering_bound_logger(level_number),
        logger_factory=structlog.BytesLoggerFactory(cast("BinaryIO", lines)),
        cache_logger_on_first_use=stream is None,
    )
    # Libraries log through the standard library; what they warn of comes out as the same kind of line.
    logging.basicConfig(handlers=[_Forward()], level=max(level_number, logging.WARNING), force=True)


def logger(name: str) -> structlog.typing.FilteringBoundLogger:
    """A logger for a module: `log = logger(__name__)`, then `log.info("what happened", fact=1)`."""
    bound: structlog.typing.FilteringBoundLogger = structlog.get_logger(module=name)
    return bound


def annotate(**facts: str | float) -> None:
    """Adds facts to every further line of the call being served. Does nothing outside of a call."""
    if (known := call_facts.get(None)) is not None:
        known.update(facts)


def valid_traceparent(text: str | None) -> str | None:
    """The W3C trace context as it came, or None if it is not one of version 00 with a trace and a parent."""
    if text is None or not (match := _TRACEPARENT.fullmatch(text)) or match[1] == _NO_TRACE or match[2] == _NO_SPAN:
        return None
    return text


def new_traceparent() -> str:
    """A new root trace context, not sampled: who wants a trace recorded brings one that says so."""
    # Unique is enough here, and a system call for each call was felt.
    return f"00-{_random.getrandbits(128):032x}-{_random.getrandbits(64):016x}-00"


def trace_id(traceparent: str) -> str:
    """The 32 hexadecimal digits that all parts of one trace share; empty if there is no trace context."""
    return traceparent[3:35]


class _Line:
    """Makes a line: what is fixed, when, how bad, whose call it belongs to, what happened."""

    def __init__(self, service: str, lines: _Lines) -> None:
        self._fixed = {"service": service, "pid": os.getpid()}
        self._lines = lines

    def __call__(self, _logger: object, level: str, event: MutableMapping[str, Any]) -> bytes:
        line: dict[str, Any] = {"time": datetime.now(UTC), "level": level, **self._fixed}
        if (call := current_call.get(None)) is not None:
            line["tenant"] = call.identity.tenant
            line["user"] = call.identity.user_id
        if facts := call_facts.get(None):
            line.update(facts)
        if event.get("exc_info"):
            event = structlog.processors.format_exc_info(_logger, level, event)
        line.update(event)
        self._lines.urgent = level not in ("debug", "info")
        return orjson.dumps(line, default=str)


class _Lines:
    """A stream of lines. Those of a moment are written together; a warning, and what came before it, at once.

    Under load there are thousands a second, and a system call for each was felt. Who is killed takes the last
    moment's lines along.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._pending: list[bytes] = []
        # Of the line that comes next.
        self.urgent = False
        # The loop that will write what is pending; another one may never get to it.
        self._promised_by: asyncio.AbstractEventLoop | None = None

    def write(self, line: bytes) -> None:
        """Takes a line."""
        self._pending.append(line)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.write_out()
            return
        if self.urgent:
            self.write_out()
        elif loop is not self._promised_by:
            self._promised_by = loop
            loop.call_later(_MOMENT_S, self.write_out)

    def flush(self) -> None:
        """As a stream must have it; the lines are written when their moment is over."""

    def write_out(self) -> None:
        """Writes what is pending."""
        lines, self._pending, self._promised_by = self._pending, [], None
        if lines:
            self._stream.write(b"".join(lines))
            self._stream.flush()


class _Forward(logging.Handler):
    """Takes what libraries log into our lines."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            structlog.get_logger(module=record.name).log(record.levelno, record.getMessage(), exc_info=record.exc_info)
        except Exception:  # noqa: BLE001 (as every handler does: a log must not end what it tells of)
            self.handleError(record)

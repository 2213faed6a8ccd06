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
from collections.abc import Callable, MutableMapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, BinaryIO

import orjson
import structlog
from msgspec import Struct

from shared.platform.identity import Call, current_call

_TRACEPARENT = re.compile("00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_MOMENT_S = 0.02
_random = random.Random()  # noqa: S311 (of no secret)

# What `annotate` adds to. The server gives each call a fresh one; outside of calls there is none.
call_facts: ContextVar[dict[str, str | float]] = ContextVar("call_facts")
_NO_FACTS: dict[str, str | float] = {}


def configure(level: str = "info", *, service: str, stream: BinaryIO | None = None) -> None:
    """Sets up logging of the process, once, at its start. `service` is in every line."""
    level_number = logging.getLevelNamesMapping()[level.upper()]
    lines = _Lines(stream or sys.stderr.buffer, {"service": service, "pid": os.getpid()}, takes_info=level_number <= logging.INFO)
    atexit.register(lines.write_out)
    structlog.configure(
        # One processor: there is a line for every call, and each further one was felt there.
        processors=[_take_note],
        wrapper_class=structlog.make_filtering_bound_logger(level_number),
        logger_factory=lambda *_: lines,
        cache_logger_on_first_use=stream is None,
    )
    # Libraries log through the standard library; what they warn of comes out as the same kind of line.
    logging.basicConfig(handlers=[_Forward()], level=max(level_number, logging.WARNING), force=True)


def logger(name: str) -> structlog.typing.FilteringBoundLogger:
    """A logger for a module: `log = logger(__name__)`, then `log.info("what_happened", fact=1)`."""
    bound: structlog.typing.FilteringBoundLogger = structlog.get_logger(module=name)
    return bound


def quick_info(module: str) -> Callable[[str, dict[str, Any]], None]:
    """A function that writes what `logger(module).info` would, given the event and its facts, which become its own.

    For the one line that every call has: the way through structlog costs more than the line. It goes where the process
    was told to log when this was asked for.
    """
    lines = structlog.get_config()["logger_factory"]()
    if not isinstance(lines, _Lines):
        log = logger(module)
        return lambda event, facts: log.info(event, **facts)
    if not lines.takes_info:
        return lambda event, facts: None

    def write(event: str, facts: dict[str, Any]) -> None:
        facts["event"], facts["module"] = event, module
        lines.info(_note("info", facts))

    return write


def annotate(**facts: str | float) -> None:
    """Adds facts to every further line of the call being served. Does nothing outside of a call."""
    if (known := call_facts.get(None)) is not None:
        known.update(facts)


def valid_traceparent(text: str | None) -> str | None:
    """The W3C trace context as it came, or None if it is not one of version 00 with a trace and a parent."""
    return text if text is not None and _TRACEPARENT.fullmatch(text) else None


def new_traceparent() -> str:
    """A new root trace context, not sampled: who wants a trace recorded brings one that says so."""
    # Unique is enough here, and a system call for each call was felt.
    return f"00-{_random.getrandbits(128):032x}-{_random.getrandbits(64):016x}-00"


def trace_id(traceparent: str) -> str:
    """The 32 hexadecimal digits that all parts of one trace share; empty if there is no trace context."""
    return traceparent[3:35]


class _Note(Struct, frozen=True):
    """What a line will be made of: when, how bad, whose call it belongs to, what happened."""

    time: datetime
    level: str
    call: Call | None
    facts: dict[str, str | float]
    event: MutableMapping[str, Any]


def _take_note(_logger: object, level: str, event: MutableMapping[str, Any]) -> tuple[tuple[_Note], dict[str, Any]]:
    """What is known now and not later, in the form in which structlog hands it on: as the arguments of a call."""
    if event.get("exc_info"):
        event = structlog.processors.format_exc_info(_logger, level, event)
    return (_note(level, event),), {}


def _note(level: str, event: MutableMapping[str, Any]) -> _Note:
    return _Note(datetime.now(UTC), level, current_call.get(None), call_facts.get(_NO_FACTS).copy(), event)


class _Lines:
    """Makes lines of notes. Those of a moment are made and written together; a warning, and what came before it, at once.

    Under load there are thousands a second: a system call for each was felt, and so was making each between two other
    things, with none of what it takes in the processor's caches. Who is killed takes the last moment's lines along.
    """

    def __init__(self, stream: BinaryIO, fixed: dict[str, str | int], *, takes_info: bool) -> None:
        """`fixed` is in every line."""
        self.takes_info = takes_info
        self._stream = stream
        self._fixed = fixed
        self._pending: list[_Note] = []
        # The loop that will write what is pending; another one may never get to it.
        self._promised_by: asyncio.AbstractEventLoop | None = None

    def debug(self, note: _Note) -> None:
        """Takes a note."""
        self._pending.append(note)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.write_out()
            return
        if loop is not self._promised_by:
            self._promised_by = loop
            loop.call_later(_MOMENT_S, self.write_out)

    info = debug

    def warning(self, note: _Note) -> None:
        """Takes a note that cannot wait."""
        self._pending.append(note)
        self.write_out()

    error = critical = exception = warning

    def write_out(self) -> None:
        """Writes what is pending."""
        notes, self._pending, self._promised_by = self._pending, [], None
        if notes:
            self._stream.write(b"".join([self._line(note) for note in notes]))
            self._stream.flush()

    def _line(self, note: _Note) -> bytes:
        line: dict[str, Any] = {"time": note.time, "level": note.level, **self._fixed}
        if note.call is not None:
            line["tenant"] = note.call.identity.tenant
            line["user"] = note.call.identity.user_id
        line.update(note.facts)
        line.update(note.event)
        try:
            return orjson.dumps(line, default=str, option=orjson.OPT_APPEND_NEWLINE)
        except orjson.JSONEncodeError:
            # Half a character, for one. The others of its moment must not be lost with it.
            return orjson.dumps({name: ascii(value) for name, value in line.items()}, option=orjson.OPT_APPEND_NEWLINE)


class _Forward(logging.Handler):
    """Takes what libraries log into our lines."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            structlog.get_logger(module=record.name).log(record.levelno, record.getMessage(), exc_info=record.exc_info)
        except Exception:  # noqa: BLE001 (as every handler does: a log must not end what it tells of)
            self.handleError(record)

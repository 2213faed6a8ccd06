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
import traceback
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, BinaryIO, Protocol

import orjson
from msgspec import Struct

from shared.platform.identity import Call, current_call

_TRACEPARENT = re.compile("00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_MOMENT_S = 0.02
_EXPORTER_TOLD_S = 300.0
_URGENT = frozenset({"warning", "error"})
_random = random.Random()  # noqa: S311 (of no secret)

# What `annotate` adds to. The server gives each call a fresh one; outside of calls there is none.
call_facts: ContextVar[dict[str, str | float]] = ContextVar("call_facts")
_NO_FACTS: dict[str, str | float] = {}


def configure(level: str = "info", *, service: str, stream: BinaryIO | None = None) -> None:
    """Sets up logging of the process, once, at its start. `service` is in every line."""
    level_number = logging.getLevelNamesMapping()[level.upper()]
    lines = _Lines(stream or sys.stderr.buffer, {"service": service, "pid": os.getpid()}, level_number)
    atexit.register(lines.write_out)
    divert(lines)
    # Libraries log through the standard library; what they warn of comes out as the same kind of line.
    logging.basicConfig(handlers=[_Forward()], level=max(level_number, logging.WARNING), force=True)


def logger(name: str) -> Logger:
    """A logger for a module: `log = logger(__name__)`, then `log.info("what_happened", fact=1)`."""
    return Logger(name)


class Output(Protocol):
    """Where the notes of all loggers go."""

    level: int
    """The least level that is taken, as `logging` numbers them."""

    def take(self, note: Note) -> None:
        """Takes a note of that level or above."""


def divert(output: Output) -> Output:
    """Sends the notes of all loggers there from now on; returns where they went before."""
    global _output
    before, _output = _output, output
    return before


class Logger:
    """Notes what happens in a module: each method takes the event's name, in snake_case, and its facts.

    The name of an event is what one searches for; whatever differs from case to case is a fact. `exc_info` is True or an
    exception, and becomes the text of a traceback.
    """

    __slots__ = ("_module",)

    def __init__(self, module: str) -> None:
        self._module = module

    def takes_debug(self) -> bool:
        """Whether lines of level debug are written: for those that are costly to make."""
        return _output.level <= logging.DEBUG

    def debug(self, event: str, **facts: Any) -> None:
        """For who looks for a defect."""
        if _output.level <= logging.DEBUG:
            self._take("debug", event, facts)

    def info(self, event: str, **facts: Any) -> None:
        """What happens in the normal course of things."""
        if _output.level <= logging.INFO:
            self._take("info", event, facts)

    def warning(self, event: str, **facts: Any) -> None:
        """What an operator may want to look at."""
        if _output.level <= logging.WARNING:
            self._take("warning", event, facts)

    def error(self, event: str, **facts: Any) -> None:
        """What an operator has to look at."""
        if _output.level <= logging.ERROR:
            self._take("error", event, facts)

    def exception(self, event: str, **facts: Any) -> None:
        """An error with the traceback of the exception being handled."""
        self.error(event, exc_info=True, **facts)

    def _take(self, level: str, event: str, facts: dict[str, Any]) -> None:
        if error := facts.pop("exc_info", None):
            error = error if isinstance(error, BaseException) else sys.exception()
            facts["exception"] = "".join(traceback.format_exception(error)).rstrip()
        facts["event"], facts["module"] = event, self._module
        _output.take(Note(datetime.now(UTC), level, current_call.get(None), call_facts.get(_NO_FACTS).copy(), facts))


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


def span_id(traceparent: str) -> str:
    """The 16 hexadecimal digits of the span that comes before; empty if there is no trace context."""
    return traceparent[36:52]


def trace_id(traceparent: str) -> str:
    """The 32 hexadecimal digits that all parts of one trace share; empty if there is no trace context."""
    return traceparent[3:35]


class Note(Struct, frozen=True):
    """What a line will be made of: when, how bad, whose call it belongs to, what happened."""

    time: datetime
    level: str
    call: Call | None
    facts: dict[str, str | float]
    event: dict[str, Any]


class _Lines:
    """Makes lines of notes. Those of a moment are made and written together; a warning, and what came before it, at once.

    Under load there are thousands a second: a system call for each was felt, and so was making each between two other
    things, with none of what it takes in the processor's caches. Who is killed takes the last moment's lines along.
    """

    def __init__(self, stream: BinaryIO, fixed: dict[str, str | int], level: int) -> None:
        """`fixed` is in every line."""
        self.level = level
        self._stream = stream
        self._fixed = fixed
        self._pending: list[Note] = []
        # The loop that will write what is pending; another one may never get to it.
        self._promised_by: asyncio.AbstractEventLoop | None = None

    def take(self, note: Note) -> None:
        """Takes a note. A warning cannot wait."""
        self._pending.append(note)
        if note.level in _URGENT:
            self.write_out()
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.write_out()
            return
        if loop is not self._promised_by:
            self._promised_by = loop
            loop.call_later(_MOMENT_S, self.write_out)

    def write_out(self) -> None:
        """Writes what is pending."""
        notes, self._pending, self._promised_by = self._pending, [], None
        if notes:
            self._stream.write(b"".join([line(note, self._fixed) for note in notes]))
            self._stream.flush()


def line(note: Note, fixed: Mapping[str, str | int]) -> bytes:
    """The line of JSON for a note; `fixed` is in it."""
    made: dict[str, Any] = {"time": note.time, "level": note.level, **fixed}
    if note.call is not None:
        made["tenant"] = note.call.identity.tenant
        made["user"] = note.call.identity.user_id
    made.update(note.facts)
    made.update(note.event)
    try:
        return orjson.dumps(made, default=str, option=orjson.OPT_APPEND_NEWLINE)
    except orjson.JSONEncodeError:
        # Half a character, for one. The others of its moment must not be lost with it.
        return orjson.dumps({name: ascii(value) for name, value in made.items()}, option=orjson.OPT_APPEND_NEWLINE)


class Unconfigured:
    """Where notes go until a process was told where to log, as in tools and tests: to standard error, as they come."""

    level = logging.DEBUG

    def take(self, note: Note) -> None:
        """Prints a note."""
        sys.stderr.write(line(note, {}).decode())


_output: Output = Unconfigured()


class _Forward(logging.Handler):
    """Takes what libraries log into our lines."""

    def __init__(self) -> None:
        super().__init__()
        self._exporter_told_at = -_EXPORTER_TOLD_S

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if record.name.startswith("opentelemetry"):
                # It complains at every try to export; a collector that is away must not fill the log.
                if record.created - self._exporter_told_at < _EXPORTER_TOLD_S:
                    return
                self._exporter_told_at = record.created
            error = record.exc_info[1] if record.exc_info else None
            write = Logger(record.name).error if record.levelno >= logging.ERROR else Logger(record.name).warning
            write(record.getMessage(), exc_info=error)
        except Exception:  # noqa: BLE001 (as every handler does: a log must not end what it tells of)
            self.handleError(record)

"""Logs as lines of JSON on standard output, and the W3C trace context of a call.

Every line that is written while a call is served has the call's trace, tenant, user and method, and the facts that
`annotate` added (for example the command id). No code may log the content of a request or a token.
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

# The facts that `annotate` adds to. The server gives each call a new dictionary; outside of calls there is none.
call_facts: ContextVar[dict[str, str | float]] = ContextVar("call_facts")
_NO_FACTS: dict[str, str | float] = {}


def configure(level: str = "info", *, service: str, stream: BinaryIO | None = None) -> None:
    """Sets up logging of the process, once, at its start. `service` is in every line."""
    level_number = logging.getLevelNamesMapping()[level.upper()]
    # A buffer of its own: what Python's could not write would give the process another exit code in the end.
    lines = _Lines(stream or open(1, "wb", closefd=False), {"service": service, "pid": os.getpid()}, level_number)  # noqa: SIM115
    atexit.register(lines.write_out)
    divert(lines)
    # Libraries log through the standard library; their warnings and errors become lines of the same form.
    logging.basicConfig(handlers=[_Forward()], level=max(level_number, logging.WARNING), force=True)


def logger(name: str) -> Logger:
    """A logger for a module: `log = logger(__name__)`, then `log.info("what_happened", fact=1)`."""
    return Logger(name)


class Output(Protocol):
    """Writes the notes of all loggers."""

    level: int
    """The lowest level that is written, as a number of the module `logging`."""

    def take(self, note: Note) -> None:
        """Takes a note of that level or above."""


def divert(output: Output) -> Output:
    """Sends the notes of all loggers to `output` from now on; returns the former output."""
    global _output
    before, _output = _output, output
    return before


class Logger:
    """Logs the events of a module: each method takes the event's name, in snake_case, and its facts.

    The name is fixed, so that one can search for it; values are facts. `exc_info` is True or an exception, and becomes the
    text of a traceback.
    """

    __slots__ = ("_module",)

    def __init__(self, module: str) -> None:
        self._module = module

    def takes_debug(self) -> bool:
        """Whether lines of level debug are written: for those that are costly to make."""
        return _output.level <= logging.DEBUG

    def debug(self, event: str, **facts: Any) -> None:
        """Details for finding a defect."""
        if _output.level <= logging.DEBUG:
            self._take("debug", event, facts)

    def info(self, event: str, **facts: Any) -> None:
        """Normal operation."""
        if _output.level <= logging.INFO:
            self._take("info", event, facts)

    def warning(self, event: str, **facts: Any) -> None:
        """Something that an operator may want to look at."""
        if _output.level <= logging.WARNING:
            self._take("warning", event, facts)

    def error(self, event: str, **facts: Any) -> None:
        """Something that an operator must look at."""
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
    """Adds facts to all further lines of the call being served. Does nothing outside of a call."""
    if (known := call_facts.get(None)) is not None:
        known.update(facts)


def valid_traceparent(text: str | None) -> str | None:
    """The trace context unchanged, or None if it is not a valid W3C one of version 00 with a trace and a parent."""
    return text if text is not None and _TRACEPARENT.fullmatch(text) else None


def new_traceparent() -> str:
    """A new root trace context, not sampled: a caller that wants its trace recorded sends a sampled one."""
    # Random numbers from the process are unique enough; from the system they would cost a system call for each call.
    return f"00-{_random.getrandbits(128):032x}-{_random.getrandbits(64):016x}-00"


def span_id(traceparent: str) -> str:
    """The 16 hexadecimal digits of the span that comes before; empty if there is no trace context."""
    return traceparent[36:52]


def trace_id(traceparent: str) -> str:
    """The trace id, as 32 hexadecimal digits; empty if there is no trace context."""
    return traceparent[3:35]


class Note(Struct, frozen=True):
    """The content of a log line: time, level, call, event and facts."""

    time: datetime
    level: str
    call: Call | None
    facts: dict[str, str | float]
    event: dict[str, Any]


class _Lines:
    """Makes lines from notes and writes them in batches, every 20 ms; a warning is written at once, with all notes before it.

    Under load there are thousands of lines a second: a batch costs one system call, and its lines are made one after the
    other, with the code in the processor's caches. kill -9 loses up to 20 ms of lines below warning.
    """

    def __init__(self, stream: BinaryIO, fixed: dict[str, str | int], level: int) -> None:
        """`fixed` is in every line."""
        self.level = level
        self._stream = stream
        self._fixed = fixed
        self._pending: list[Note] = []
        # The event loop that will write the pending notes. A note of another loop schedules the write anew.
        self._promised_by: asyncio.AbstractEventLoop | None = None

    def take(self, note: Note) -> None:
        """Takes a note. Writes at once if it is a warning or an error."""
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
        """Writes the pending notes."""
        notes, self._pending, self._promised_by = self._pending, [], None
        if notes:
            self._stream.write(b"".join([line(note, self._fixed) for note in notes]))
            self._stream.flush()


def line(note: Note, fixed: Mapping[str, str | int]) -> bytes:
    """A note as a line of JSON, with the facts in `fixed`."""
    made: dict[str, Any] = {"time": note.time, "level": note.level, **fixed}
    if note.call is not None:
        made["tenant"] = note.call.identity.tenant
        made["user"] = note.call.identity.user_id
    made.update(note.facts)
    made.update(note.event)
    try:
        return orjson.dumps(made, default=str, option=orjson.OPT_APPEND_NEWLINE)
    except orjson.JSONEncodeError:
        # The note cannot be encoded, for example a text with half a character. The other notes of the batch must be written.
        return orjson.dumps({name: ascii(value) for name, value in made.items()}, option=orjson.OPT_APPEND_NEWLINE)


class Unconfigured:
    """Prints notes to standard error at once, until `configure` was called: in tools and tests."""

    level = logging.DEBUG

    def take(self, note: Note) -> None:
        """Prints a note."""
        sys.stderr.write(line(note, {}).decode())


_output: Output = Unconfigured()


class _Forward(logging.Handler):
    """Makes our lines from the log records of libraries."""

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

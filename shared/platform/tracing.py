"""Traces: spans made by hand at the few places where work is handed on, sent over OTLP.

    span = tracing.start("bank.v1.AccountService/WithdrawMoney", "server", parent=traceparent)
    ...
    tracing.end(span)

Nothing is set up, the SDK is not even imported, and `start` returns None at once, unless OpenTelemetry's own variables name
an exporter (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_TRACES_EXPORTER); they also choose the sampler, limits and time-outs. What is
not sampled has no span: `start` returns None again. So whoever makes a span writes nothing but `if span is not None`.

A trace goes on as W3C text, `traceparent`, in metadata of gRPC, in the events' metadata and in the headers on NATS. No span
may hold what a request or an event says, a user's name or a token: types, ids, counts and statuses only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal

from shared.platform.otel import exports, run_within
from shared.platform.telemetry import new_traceparent

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

    from shared.platform.spans import Recorder

Kind = Literal["server", "client", "producer", "consumer", "internal"]
Attributes = Mapping[str, str | int | float | bool]

SHUTDOWN_S = 2.0

# The statuses by which a server says that it is at fault: of them alone its span is an error.
# https://opentelemetry.io/docs/specs/semconv/rpc/grpc/
SERVER_FAULTS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})

# What the process records with; one for the process, as its log is.
_recorder: Recorder | None = None


def configure(service: str, exporter: SpanExporter | None = None) -> None:
    """Begins to record, if OpenTelemetry's variables ask for it, or to the given exporter. Once, at the process's start."""
    global _recorder  # noqa: PLW0603 (see above)
    if exporter is not None or exports("traces"):
        from shared.platform.spans import Recorder  # noqa: PLC0415 (0.6 s of a start, seldom needed)

        _recorder = Recorder(service, exporter)


def shutdown(within_s: float = SHUTDOWN_S) -> None:
    """Sends what is left, as far as that goes within the time, and records no more."""
    global _recorder
    recorder, _recorder = _recorder, None
    if recorder is not None:
        run_within(within_s, recorder.shutdown)


def on() -> bool:
    """Whether this process records any spans."""
    return _recorder is not None


def recorded(traceparent: str) -> bool:
    """Whether the trace is one that its caller records."""
    return traceparent.endswith(("1", "3", "5", "7", "9", "b", "d", "f"))


def start(
    name: str,
    kind: Kind,
    *,
    parent: str,
    attributes: Attributes | None = None,
    links: Iterable[str] = (),
    start_ns: int | None = None,
) -> Span | None:
    """A span below `parent`; None if it is not recorded. `parent` and `links` are traceparents."""
    if _recorder is None or not parent or (_recorder.follows_parents and not recorded(parent)):
        return None
    return _recorder.start(name, kind, parent, attributes or {}, links, start_ns)


def begin(name: str, kind: Kind, *, attributes: Attributes | None = None) -> tuple[str, Span | None]:
    """A new trace: its traceparent, and its first span if the sampler wants it recorded."""
    traceparent = new_traceparent()
    span = None if _recorder is None else _recorder.begin(name, kind, traceparent, attributes or {})
    return (traceparent, None) if span is None else (traceparent_of(span), span)


def end(span: Span, *, error: str = "", end_ns: int | None = None) -> None:
    """Ends a span; `error` is the kind of what went wrong, never its text."""
    if error:
        from shared.platform.spans import FAILED  # noqa: PLC0415 (there is a span, so it is loaded)

        span.set_attribute("error.type", error)
        span.set_status(FAILED)
    span.end(end_ns)


def traceparent_of(span: Span) -> str:
    """What to hand on, so that others go on below this span."""
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags & 1:02x}"

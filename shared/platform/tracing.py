"""Traces: spans of OpenTelemetry, made by hand at the few places where work is handed on, sent over OTLP.

    span = tracing.start("bank.v1.AccountService/WithdrawMoney", SpanKind.SERVER, parent=traceparent)
    ...
    tracing.end(span)

Nothing is set up, and `start` returns None at once, unless OpenTelemetry's own variables name an exporter
(OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_TRACES_EXPORTER); they also choose the sampler, limits and time-outs. What is not
sampled has no span: `start` returns None again. So whoever makes a span writes nothing but `if span is not None`.

A trace goes on as W3C text, `traceparent`, in metadata of gRPC, in the events' metadata and in the headers on NATS. No span
may hold what a request or an event says, a user's name or a token: types, ids, counts and statuses only.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, cast

from opentelemetry.context import Context
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    Tracer,
    set_span_in_context,
)

from shared.platform.metrics import SCOPE, exports, release, resource
from shared.platform.telemetry import new_traceparent

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.sdk.trace.id_generator import IdGenerator

_random = random.Random()  # noqa: S311 (of no secret)

__all__ = ["Span", "SpanKind", "begin", "configure", "context_of", "end", "on", "recorded", "shutdown", "start", "traceparent_of"]

Attributes = Mapping[str, str | int | float | bool]

# The statuses by which a server says that it is at fault: of them alone its span is an error.
# https://opentelemetry.io/docs/specs/semconv/rpc/grpc/
SERVER_FAULTS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})

_NOTHING = Context()


class _Ids:
    """Random ids; the next trace's may be given, so that the sampler is asked about it before a span is made."""

    def __init__(self) -> None:
        self.trace_id = 0

    def generate_span_id(self) -> int:
        return _random.getrandbits(64) or 1

    def generate_trace_id(self) -> int:
        given, self.trace_id = self.trace_id, 0
        return given or _random.getrandbits(128) or 1


class _Tracing:
    """What one process records with; one for the process, as its log is."""

    provider: TracerProvider | None = None
    tracer: Tracer
    ids = _Ids()
    # Whether a trace that its caller does not record is not recorded here either: then the sampler need not be asked.
    follows_parents = True


def configure(service: str, exporter: SpanExporter | None = None) -> None:
    """Begins to record, if OpenTelemetry's variables ask for it, or to the given exporter. Once, at the process's start."""
    if exporter is None and not exports("traces"):
        return
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415 (0.6 s with the exporter, seldom needed)
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    from opentelemetry.sdk.trace.sampling import ParentBased  # noqa: PLC0415

    if exporter is None:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter  # noqa: PLC0415

        exporter = OTLPSpanExporter()
    provider = TracerProvider(resource=resource(service), shutdown_on_exit=False, id_generator=cast("IdGenerator", _Tracing.ids))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    _Tracing.provider, _Tracing.tracer = provider, provider.get_tracer(SCOPE, release())
    _Tracing.follows_parents = isinstance(provider.sampler, ParentBased)


def shutdown(within_s: float) -> None:
    """Sends what is left, as far as that goes within the time, and records no more.

    The SDK's own shutdown blocks for as long as the exporter tries, 4 s and more with a collector that is away: so it has
    a thread of its own, which ends with the process.
    """
    provider, _Tracing.provider = _Tracing.provider, None
    if provider is not None:
        ending = threading.Thread(target=provider.shutdown, name="tracing-shutdown", daemon=True)
        ending.start()
        ending.join(within_s)


def on() -> bool:
    """Whether this process records any spans."""
    return _Tracing.provider is not None


def recorded(traceparent: str) -> bool:
    """Whether the trace is one that its caller records."""
    return traceparent.endswith(("1", "3", "5", "7", "9", "b", "d", "f"))


def start(
    name: str,
    kind: SpanKind,
    *,
    parent: str,
    attributes: Attributes | None = None,
    links: Iterable[str] = (),
    start_ns: int | None = None,
) -> Span | None:
    """A span below `parent`; None if it is not recorded. `parent` and `links` are traceparents."""
    if _Tracing.provider is None or (_Tracing.follows_parents and not recorded(parent)):
        return None
    context = set_span_in_context(NonRecordingSpan(context_of(parent)), _NOTHING)
    linked = [Link(context_of(link)) for link in links]
    span = _Tracing.tracer.start_span(name, context, kind, dict(attributes or {}), linked, start_ns)
    return span if span.is_recording() else None


def begin(name: str, kind: SpanKind, *, attributes: Attributes | None = None) -> tuple[str, Span | None]:
    """A new trace: its traceparent, and its first span if the sampler wants it recorded."""
    provider = _Tracing.provider
    if provider is None:
        return new_traceparent(), None
    # The sampler is asked before the SDK makes a span, which takes 8 us also for one that is not recorded.
    traceparent = new_traceparent()
    trace_id = int(traceparent[3:35], 16)
    if not provider.sampler.should_sample(None, trace_id, name, kind).decision.is_sampled():
        return traceparent, None
    _Tracing.ids.trace_id = trace_id
    span = _Tracing.tracer.start_span(name, _NOTHING, kind, dict(attributes or {}))
    return traceparent_of(span), span if span.is_recording() else None


def end(span: Span, *, error: str = "", end_ns: int | None = None) -> None:
    """Ends a span; `error` is the kind of what went wrong, never its text."""
    if error:
        span.set_attribute("error.type", error)
        span.set_status(Status(StatusCode.ERROR))
    span.end(end_ns)


def traceparent_of(span: Span) -> str:
    """What to hand on, so that others go on below this span."""
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags & 1:02x}"


def context_of(traceparent: str) -> SpanContext:
    """The context that a traceparent names. Raises ValueError for what is none."""
    return SpanContext(
        int(traceparent[3:35], 16), int(traceparent[36:52], 16), is_remote=True, trace_flags=TraceFlags(int(traceparent[53:], 16))
    )

"""OpenTelemetry's SDK behind `shared.platform.tracing`. Imported only where spans are recorded."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, Decision, ParentBased, Sampler, TraceIdRatioBased
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)

from shared.platform.otel import SCOPE, release, resource

KINDS = {kind.name.lower(): kind for kind in SpanKind}
FAILED = Status(StatusCode.ERROR)

_NOTHING = Context()
_random = random.Random()  # noqa: S311 (of no secret)


class _Ids(IdGenerator):
    """Random ids; the next trace's may be given, so that the sampler is asked about it before a span is made."""

    def __init__(self) -> None:
        self.trace_id = 0

    def generate_span_id(self) -> int:
        return _random.getrandbits(64) or 1

    def generate_trace_id(self) -> int:
        given, self.trace_id = self.trace_id, 0
        return given or _random.getrandbits(128) or 1


class Recorder:
    """Records the spans of one process and exports them in a thread of its own."""

    def __init__(self, service: str, exporter: SpanExporter | None = None) -> None:
        """Exports over OTLP unless another exporter is given. The sampler is that of OTEL_TRACES_SAMPLER."""
        self._ids = _Ids()
        self._provider = TracerProvider(
            resource=Resource.create(dict(resource(service))), shutdown_on_exit=False, id_generator=self._ids
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer(SCOPE, release())
        self.shutdown = self._provider.shutdown
        # Whether a trace that its caller does not record is not recorded here either: then the sampler need not be asked.
        self.follows_parents = isinstance(self._provider.sampler, ParentBased)
        # Which new traces are recorded, if their ids alone decide that: those whose last 64 bits are a lower number.
        self._bound = _bound_of(self._provider.sampler)

    def start(
        self,
        name: str,
        kind: str,
        parent: str,
        attributes: Mapping[str, str | int | float | bool],
        links: Iterable[str],
        start_ns: int | None,
    ) -> Span | None:
        """A span below a traceparent; None if the sampler does not want it."""
        context = set_span_in_context(NonRecordingSpan(_context_of(parent)), _NOTHING)
        linked = [Link(_context_of(link)) for link in links]
        span = self._tracer.start_span(name, context, KINDS[kind], dict(attributes), linked, start_ns)
        return span if span.is_recording() else None

    def begin(self, name: str, kind: str, traceparent: str, attributes: Mapping[str, str | int | float | bool]) -> Span | None:
        """The first span of the trace that the traceparent names; None if the sampler does not want it."""
        if self._bound is not None and int(traceparent[19:35], 16) >= self._bound:
            return None  # nearly every call of a service that records few: the sampler would take 3 us to say so
        # The sampler is asked before the SDK makes a span, which takes 8 us also for one that is not recorded.
        trace_id = int(traceparent[3:35], 16)
        decision = self._provider.sampler.should_sample(None, trace_id, name, KINDS[kind]).decision
        if decision is not Decision.RECORD_AND_SAMPLE:
            return None
        self._ids.trace_id = trace_id
        span = self._tracer.start_span(name, _NOTHING, KINDS[kind], dict(attributes))
        return span if span.is_recording() else None


def _bound_of(sampler: Sampler) -> int | None:
    """The number below which the last 64 bits of a new trace's id must be for it to be recorded; None if more decides."""
    root = getattr(sampler, "_root", sampler)
    if root is ALWAYS_OFF:
        return 0
    return root.bound if isinstance(root, TraceIdRatioBased) else None


def _context_of(traceparent: str) -> SpanContext:
    """The context that a traceparent names. Raises ValueError for what is none."""
    return SpanContext(
        int(traceparent[3:35], 16), int(traceparent[36:52], 16), is_remote=True, trace_flags=TraceFlags(int(traceparent[53:], 16))
    )

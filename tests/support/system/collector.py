"""A collector of OpenTelemetry in the test's own process: keeps the spans and the metrics that processes export to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from grpc import aio
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span


@dataclass(frozen=True)
class Seen:
    """A span and the service that recorded it."""

    service: str
    span: Span

    @property
    def name(self) -> str:
        """The span's name."""
        return self.span.name

    @property
    def id(self) -> str:
        """The span's id."""
        return self.span.span_id.hex()

    @property
    def parent(self) -> str:
        """The id of the span that it is below."""
        return self.span.parent_span_id.hex()

    @property
    def links(self) -> set[str]:
        """The ids of the spans that it is linked to."""
        return {link.span_id.hex() for link in self.span.links}

    @property
    def attributes(self) -> dict[str, Any]:
        """Its attributes."""
        return {each.key: getattr(each.value, each.value.WhichOneof("value") or "") for each in self.span.attributes}


@dataclass
class Collector:
    """What came, and where it listens."""

    url: str = ""
    spans: list[Seen] = field(default_factory=list)
    metrics: set[str] = field(default_factory=set)
    answers: asyncio.Event = field(default_factory=asyncio.Event)
    """Set from the start; while it is not, spans are taken and their exports not answered."""

    def settings(self) -> dict[str, str]:
        """OpenTelemetry's variables for a process that shall export to it, soon after each span."""
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": self.url,
            "OTEL_BSP_SCHEDULE_DELAY": "200",
            "OTEL_METRIC_EXPORT_INTERVAL": "1000",
        }

    def of(self, trace_id: str) -> list[Seen]:
        """The spans of one trace."""
        return [seen for seen in self.spans if seen.span.trace_id.hex() == trace_id]

    def texts(self) -> Iterator[str]:
        """Every text in any span."""
        for seen in self.spans:
            yield seen.name
            yield str(seen.span)


class _Traces(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self, collector: Collector) -> None:
        self._collector = collector

    async def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 (its name in the .proto)
        await self._collector.answers.wait()
        for resource in request.resource_spans:
            names = [each.value.string_value for each in resource.resource.attributes if each.key == "service.name"]
            for scope in resource.scope_spans:
                self._collector.spans += [Seen(names[0], span) for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()


class _Metrics(metrics_service_pb2_grpc.MetricsServiceServicer):
    def __init__(self, collector: Collector) -> None:
        self._collector = collector

    async def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 (its name in the .proto)
        for resource in request.resource_metrics:
            for scope in resource.scope_metrics:
                self._collector.metrics |= {metric.name for metric in scope.metrics}
        return metrics_service_pb2.ExportMetricsServiceResponse()


@asynccontextmanager
async def collecting() -> AsyncIterator[Collector]:
    """A collector that listens in the block."""
    collector = Collector()
    collector.answers.set()
    server = aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(_Traces(collector), server)  # type: ignore[no-untyped-call]
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(_Metrics(collector), server)  # type: ignore[no-untyped-call]
    collector.url = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield collector
    finally:
        await server.stop(0)

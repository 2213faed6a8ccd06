"""Metrics over OTLP: what `Metrics` holds, handed to OpenTelemetry's SDK every OTEL_METRIC_EXPORT_INTERVAL ms.

Imported only where an export is asked for: the SDK and its exporter take most of a second of a start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import Exemplar as OtlpExemplar
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    HistogramDataPoint,
    Metric,
    MetricsData,
    PeriodicExportingMetricReader,
    ResourceMetrics,
    ScopeMetrics,
)
from opentelemetry.sdk.metrics.export import Histogram as HistogramPoints
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from shared.platform.instruments import Histogram, Number
from shared.platform.otel import release, run_within


class MetricExport:
    """Exports until it is shut down, in a thread of its own."""

    def __init__(self, attributes: Mapping[str, str], scope: str, histograms: Callable[[], Sequence[Histogram]]) -> None:
        """`attributes` tell what the process is; `histograms` are asked for at each export."""
        self._histograms = histograms
        self._scope = InstrumentationScope(scope, release())
        self._resource = Resource.create(dict(attributes))
        # Bound here: the reader is the SDK's, and hands what it has read to a method of its own.
        export = self

        class Reader(PeriodicExportingMetricReader):
            def _receive_metrics(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **more: Any) -> None:
                super()._receive_metrics(export._with_histograms(metrics_data), timeout_millis=timeout_millis, **more)

        self._provider = MeterProvider([Reader(OTLPMetricExporter())], self._resource, shutdown_on_exit=False)
        self._meter = self._provider.get_meter(scope, release())

    def add(self, number: Number) -> None:
        """Exports a counter or a gauge."""
        make = self._meter.create_observable_counter if number.grows else self._meter.create_observable_gauge
        make(number.name, [_callback(number)], number.unit, number.description)

    def shutdown(self, timeout_s: float) -> None:
        """Exports once more, as far as that goes within the time."""
        run_within(timeout_s, self._provider.shutdown)

    def _with_histograms(self, data: MetricsData | None) -> MetricsData:
        """The SDK's metrics and ours."""
        resources = [] if data is None else data.resource_metrics
        theirs = [metric for resource in resources for scope in resource.scope_metrics for metric in scope.metrics]
        # Of one resource and of one scope: of two entries for the same the encoder keeps the last.
        ours = ScopeMetrics(self._scope, [*theirs, *map(_metric, self._histograms())], "")
        return MetricsData([ResourceMetrics(self._resource, [ours], "")])


def _callback(number: Number) -> Callable[[CallbackOptions], Iterable[Observation]]:
    return lambda _: [Observation(value, dict(labels)) for value, labels in number.read()]


def _metric(histogram: Histogram) -> Metric:
    """All series of a histogram as they are now."""
    points = [
        HistogramDataPoint(
            attributes=dict(zip(histogram.labels, series.labels, strict=True)),
            start_time_unix_nano=histogram.began_ns,
            time_unix_nano=series.at_ns,
            count=sum(series.counts),
            sum=series.total,
            bucket_counts=series.counts,
            explicit_bounds=histogram.bounds,
            min=float("inf"),
            max=float("-inf"),
            exemplars=[]
            if (example := series.example) is None
            else [OtlpExemplar({}, example.value, example.at_ns, int(example.span_id, 16), int(example.trace_id, 16))],
        )
        for series in histogram.series()
    ]
    data = HistogramPoints(points, AggregationTemporality.CUMULATIVE)
    return Metric(histogram.name, histogram.description, histogram.unit, data)

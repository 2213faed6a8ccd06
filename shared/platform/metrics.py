"""Metrics of a process: numbers that the code counts in plain variables, read when somebody asks for them.

    metrics.counter("foldline.commands", "Commands by outcome.", lambda: measures.by_outcome())
    waits = Histogram("foldline.command.queue.wait", "...", unit="s", bounds=SECONDS);  metrics.add(waits)

A call of an instrument of OpenTelemetry's SDK takes 13 to 15 us here, which a command would pay several times over; adding
to an integer takes 0.05 us, and `Histogram.observe` 0.5 us. So counters and gauges are observable instruments, whose
callbacks run at a scrape, and histograms count by themselves and hand their points to the SDK's readers.

They go where OpenTelemetry's own variables say (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_METRICS_EXPORTER, ...), and always to
`render`, which the admin port answers Prometheus with.
"""

from __future__ import annotations

import asyncio
import os
import time
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from typing import Any

from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import Exemplar, MeterProvider
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    HistogramDataPoint,
    Metric,
    MetricReader,
    MetricsData,
    ScopeMetrics,
)
from opentelemetry.sdk.metrics.export import Histogram as HistogramPoints
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.samples import Exemplar as PrometheusExemplar
from prometheus_client.samples import Timestamp

from shared.platform.telemetry import logger

SCOPE = "foldline"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
WATCH_S = 5.0
SERIES_MAX = 2000
"""Of one metric: what comes on top is counted under the label `overflow`, so no caller can make a process grow."""

Labels = Mapping[str, str]
Read = Callable[[], Iterable[tuple[float, Labels]]]
"""Returns the values of a metric now, each with its labels. Called in another thread: it copies what it iterates over."""

log = logger(__name__)


def release() -> str:
    """The version of this release."""
    try:
        return version("foldline")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0"


def resource(service: str) -> Resource:
    """What this process is, for all its telemetry. OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES override it."""
    attributes = {"service.version": release(), "service.namespace": SCOPE}
    if not os.environ.get("OTEL_SERVICE_NAME") and "service.name=" not in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", ""):
        attributes["service.name"] = service
    return Resource.create(attributes)


class Histogram:
    """Counts values by buckets; its series are told apart by the values of `labels`."""

    def __init__(self, name: str, description: str, *, unit: str, bounds: Sequence[float], labels: Sequence[str] = ()) -> None:
        """`bounds` are the upper, inclusive ends of the buckets; one bucket without an end is added."""
        self.name = name
        self._description = description
        self._unit = unit
        self._bounds = tuple(bounds)
        self._labels = tuple(labels)
        # For each series the counts of its buckets, and last the sum of all values.
        self._series: dict[tuple[str, ...], list[float]] = {}
        self._exemplars: dict[tuple[str, ...], Exemplar] = {}
        self._began = time.time_ns()

    def observe(self, value: float, labels: tuple[str, ...] = (), *, traceparent: str = "") -> None:
        """Counts a value. A `traceparent`, of a call whose trace is recorded, makes it the series' example."""
        cells = self._series.get(labels)
        if cells is None:
            if len(self._series) >= SERIES_MAX:
                labels = ("overflow",) * len(self._labels)
            cells = self._series.setdefault(labels, [0.0] * (len(self._bounds) + 2))
        cells[bisect_left(self._bounds, value)] += 1
        cells[-1] += value
        if traceparent:
            trace, span = int(traceparent[3:35], 16), int(traceparent[36:52], 16)
            self._exemplars[labels] = Exemplar({}, value, time.time_ns(), span, trace)

    def metric(self) -> Metric:
        """All series as they are now."""
        now = time.time_ns()
        points = []
        for labels, cells in list(self._series.items()):
            *counts, total = list(cells)
            example = self._exemplars.get(labels)
            points.append(
                HistogramDataPoint(
                    attributes=dict(zip(self._labels, labels, strict=True)),
                    start_time_unix_nano=self._began,
                    time_unix_nano=now,
                    count=int(sum(counts)),
                    sum=total,
                    bucket_counts=[int(count) for count in counts],
                    explicit_bounds=self._bounds,
                    min=float("inf"),
                    max=float("-inf"),
                    exemplars=[] if example is None else [example],
                )
            )
        return Metric(self.name, self._description, self._unit, HistogramPoints(points, AggregationTemporality.CUMULATIVE))

    def family(self) -> HistogramMetricFamily:
        """The same for Prometheus, which gets the examples from here: the SDK's reader for Prometheus drops them."""
        unit = {"s": "seconds", "By": "bytes"}.get(self._unit, "")
        name = self.name.replace(".", "_") + (f"_{unit}" if unit else "")
        labels = [label.replace(".", "_") for label in self._labels]
        family = HistogramMetricFamily(name, self._description, labels=labels, unit=unit)
        ends = [*map(str, self._bounds), "+Inf"]
        for values, cells in list(self._series.items()):
            *counts, total = list(cells)
            buckets: list[Any] = list(zip(ends, accumulate(counts), strict=True))
            if (example := self._exemplars.get(values)) is not None:
                at = bisect_left(self._bounds, example.value)
                ids = {"trace_id": f"{example.trace_id:032x}", "span_id": f"{example.span_id:016x}"}
                stamp = Timestamp(*divmod(example.time_unix_nano, 1_000_000_000))
                buckets[at] = (*buckets[at], PrometheusExemplar(ids, example.value, stamp))
            family.add_metric(values, buckets, sum_value=total)
        return family


class Metrics:
    """All metrics of one process."""

    def __init__(self, service: str = SCOPE) -> None:
        self._histograms: dict[str, Histogram] = {}
        self._refreshers: list[Callable[[], Awaitable[None]]] = []
        self._registry = CollectorRegistry()
        self._registry.register(self)
        readers: list[MetricReader] = [PrometheusMetricReader(scope_info_enabled=False, registry=self._registry)]
        if exports("metrics"):
            readers.append(_periodic(self._with_histograms))
        self._provider = MeterProvider(readers, resource(service), shutdown_on_exit=False)
        self._meter = self._provider.get_meter(SCOPE, release())

    def counter(self, name: str, description: str, read: Read, *, unit: str = "1") -> None:
        """A number that only grows, until the process ends."""
        self._meter.create_observable_counter(name, [_callback(read)], unit, description)

    def gauge(self, name: str, description: str, read: Read, *, unit: str = "1") -> None:
        """A number as it is now."""
        self._meter.create_observable_gauge(name, [_callback(read)], unit, description)

    def add(self, *histograms: Histogram) -> None:
        """Makes histograms part of what is exported. Raises ValueError for a name that is taken."""
        for histogram in histograms:
            if self._histograms.setdefault(histogram.name, histogram) is not histogram:
                raise ValueError(f"the metric {histogram.name} is there already")

    def watch(self, refresh: Callable[[], Awaitable[None]]) -> None:
        """Calls `refresh` every few seconds: for numbers that a database must be asked for, which no scrape shall wait for."""
        self._refreshers.append(refresh)

    async def watch_loop(self) -> None:
        """Refreshes until cancelled. Numbers that cannot be had stay as they were."""
        told = False
        while True:
            for refresh in self._refreshers:
                try:
                    async with asyncio.timeout(WATCH_S):
                        await refresh()
                    told = False
                except Exception as error:  # noqa: BLE001 (metrics must never end a process)
                    if not told:
                        told = True
                        log.info("metrics_not_refreshed", error=type(error).__name__)
            await asyncio.sleep(WATCH_S)

    async def render(self, accept: str = "") -> tuple[str, bytes]:
        """The content type and the text of all metrics, in the format that the Accept header asks for."""
        encode, kind = choose_encoder(accept)
        # In another thread: it takes some milliseconds, which calls need not wait for.
        return kind, await asyncio.to_thread(encode, self._registry)

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """The histograms; the registry asks for them at a scrape."""
        for histogram in list(self._histograms.values()):
            yield histogram.family()

    def shutdown(self, timeout_s: float) -> None:
        """Hands out what is left, as far as that goes within the time."""
        self._provider.shutdown(timeout_millis=timeout_s * 1000)

    def _with_histograms(self, data: MetricsData) -> MetricsData:
        """The SDK's metrics and ours."""
        ours = ScopeMetrics(InstrumentationScope(SCOPE, release()), [each.metric() for each in self._histograms.values()], "")
        first, *others = data.resource_metrics
        return MetricsData([replace(first, scope_metrics=[*first.scope_metrics, ours]), *others])


def exports(signal: str) -> bool:
    """Whether OpenTelemetry's variables ask for an export of `traces` or `metrics` over OTLP.

    Nothing is exported unless an endpoint or an exporter is named: the default of the specification, a collector on
    localhost, would have every process look for one.
    """
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    chosen = os.environ.get(f"OTEL_{signal.upper()}_EXPORTER", "").lower()
    if chosen:
        return "otlp" in chosen.split(",")
    return any(os.environ.get(name) for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", f"OTEL_EXPORTER_OTLP_{signal.upper()}_ENDPOINT"))


def _callback(read: Read) -> Callable[[CallbackOptions], Iterable[Observation]]:
    return lambda _: [Observation(value, dict(labels)) for value, labels in read()]


def _periodic(extend: Callable[[MetricsData], MetricsData]) -> MetricReader:
    """Sends metrics over OTLP in a thread of its own, every OTEL_METRIC_EXPORT_INTERVAL ms."""
    from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter  # noqa: PLC0415 (0.6 s, seldom needed)
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader  # noqa: PLC0415

    class Extended(PeriodicExportingMetricReader):
        def _receive_metrics(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **more: Any) -> None:
            super()._receive_metrics(extend(metrics_data), timeout_millis=timeout_millis, **more)

    return Extended(OTLPMetricExporter())

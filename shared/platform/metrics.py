"""Metrics of a process: numbers that the code counts in plain variables, read when somebody asks for them.

    metrics.counter("foldline.commands", "Commands by outcome.", lambda: measures.by_outcome())
    waits = Histogram("foldline.command.queue.wait", "...", unit="s", bounds=SECONDS);  metrics.add(waits)

A call of an instrument of OpenTelemetry's SDK takes 13 to 15 us here, which a command would pay several times over; adding
to an integer takes 0.05 us, and `Histogram.observe` 0.5 us. So counters and gauges are functions that are called at a
scrape, and histograms count by themselves.

They are always there for `render`, which the admin port answers Prometheus with (shared/platform/prometheus.py), and go
over OTLP if OpenTelemetry's own variables ask for that (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_METRICS_EXPORTER, ...): see
shared/platform/otlp.py.
"""

from __future__ import annotations

import asyncio
import os
import time
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING
from urllib.parse import unquote
from uuid import uuid4

from shared.platform.telemetry import logger

if TYPE_CHECKING:
    from shared.platform.otlp import MetricExport

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


def resource(service: str) -> dict[str, str]:
    """What this process is, for all its telemetry. OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES override it."""
    attributes = {
        "service.name": service,
        "service.namespace": SCOPE,
        "service.version": release(),
        "service.instance.id": _INSTANCE,
    }
    for pair in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "").split(","):
        key, separator, value = pair.partition("=")
        if separator:
            attributes[key.strip()] = unquote(value.strip())
    if name := os.environ.get("OTEL_SERVICE_NAME"):
        attributes["service.name"] = name
    return attributes


_INSTANCE = str(uuid4())


@dataclass(frozen=True, slots=True)
class Number:
    """A counter, which only grows until the process ends, or a gauge."""

    name: str
    description: str
    unit: str
    grows: bool
    read: Read


@dataclass(frozen=True, slots=True)
class Example:
    """A value that was observed in a call whose trace is recorded."""

    value: float
    at_ns: int
    trace_id: str
    span_id: str


@dataclass(frozen=True, slots=True)
class Series:
    """The counts of one combination of labels: for each bucket, and the sum of all values."""

    labels: tuple[str, ...]
    counts: list[int]
    total: float
    example: Example | None
    at_ns: int


class Histogram:
    """Counts values by buckets; its series are told apart by the values of `labels`."""

    def __init__(self, name: str, description: str, *, unit: str, bounds: Sequence[float], labels: Sequence[str] = ()) -> None:
        """`bounds` are the upper, inclusive ends of the buckets; one bucket without an end is added."""
        self.name = name
        self.description = description
        self.unit = unit
        self.bounds = tuple(bounds)
        self.labels = tuple(labels)
        self.began_ns = time.time_ns()
        # For each series the counts of its buckets, and last the sum of all values.
        self._series: dict[tuple[str, ...], list[float]] = {}
        self._examples: dict[tuple[str, ...], Example] = {}

    def observe(self, value: float, labels: tuple[str, ...] = (), *, traceparent: str = "") -> None:
        """Counts a value. A `traceparent`, of a call whose trace is recorded, makes it the series' example."""
        cells = self._series.get(labels)
        if cells is None:
            if len(self._series) >= SERIES_MAX:
                labels = ("overflow",) * len(self.labels)
            cells = self._series.setdefault(labels, [0.0] * (len(self.bounds) + 2))
        cells[bisect_left(self.bounds, value)] += 1
        cells[-1] += value
        if traceparent:
            self._examples[labels] = Example(value, time.time_ns(), traceparent[3:35], traceparent[36:52])

    def series(self) -> Iterator[Series]:
        """All series as they are now."""
        now = time.time_ns()
        for labels, cells in list(self._series.items()):
            *counts, total = list(cells)
            yield Series(labels, [int(count) for count in counts], total, self._examples.get(labels), now)


class Metrics:
    """All metrics of one process."""

    def __init__(self, service: str = SCOPE) -> None:
        self._numbers: dict[str, Number] = {}
        self._histograms: dict[str, Histogram] = {}
        self._refreshers: list[Callable[[], Awaitable[None]]] = []
        self.attributes = resource(service)
        self._export: MetricExport | None = None
        if exports("metrics"):
            from shared.platform.otlp import MetricExport  # noqa: PLC0415 (0.6 s of a start, seldom needed)

            self._export = MetricExport(self.attributes, SCOPE, lambda: list(self._histograms.values()))

    def counter(self, name: str, description: str, read: Read, *, unit: str = "1") -> None:
        """A number that only grows, until the process ends. Raises ValueError for a name that is taken."""
        self._add(Number(name, description, unit, True, read))

    def gauge(self, name: str, description: str, read: Read, *, unit: str = "1") -> None:
        """A number as it is now. Raises ValueError for a name that is taken."""
        self._add(Number(name, description, unit, False, read))

    def _add(self, number: Number) -> None:
        if self._numbers.setdefault(number.name, number) is not number:
            raise ValueError(f"the metric {number.name} is there already")
        if self._export is not None:
            self._export.add(number)

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

        def in_thread() -> tuple[str, bytes]:
            from shared.platform import prometheus  # noqa: PLC0415 (0.25 s of a start)

            return prometheus.render(self, accept)

        # It takes some milliseconds, and longer the first time, which calls need not wait for.
        return await asyncio.to_thread(in_thread)

    def every(self) -> list[Number | Histogram]:
        """All metrics there are."""
        return [*self._numbers.values(), *self._histograms.values()]

    def shutdown(self, timeout_s: float) -> None:
        """Exports what is left, as far as that goes within the time."""
        if self._export is not None:
            self._export.shutdown(timeout_s)


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

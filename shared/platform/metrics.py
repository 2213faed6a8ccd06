"""Metrics of a process: numbers that the code counts in plain variables, read when somebody asks for them.

    metrics.counter("foldline.commands", "Commands by outcome.", lambda: measures.by_outcome())
    waits = Histogram("foldline.command.queue.wait", "...", unit="s", bounds=SECONDS);  metrics.add(waits)

They are always there for `render`, which the admin port answers Prometheus with (shared/platform/prometheus.py), and go
over OTLP if OpenTelemetry's own variables ask for that (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_METRICS_EXPORTER, ...): see
shared/platform/otlp.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from shared.platform.instruments import Histogram, Number, Read
from shared.platform.otel import SCOPE, exports, resource
from shared.platform.telemetry import logger

if TYPE_CHECKING:
    from shared.platform.otlp import MetricExport

WATCH_S = 5.0

log = logger(__name__)


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
        """Refreshes until cancelled. Numbers that cannot be had stay as they were; the log says once that they cannot."""
        failing = set[Callable[[], Awaitable[None]]]()
        while True:
            for refresh in self._refreshers:
                try:
                    async with asyncio.timeout(WATCH_S):
                        await refresh()
                    failing.discard(refresh)
                except Exception as error:  # noqa: BLE001 (metrics must never end a process)
                    if refresh not in failing:
                        failing.add(refresh)
                        log.info("metrics_not_refreshed", error=type(error).__name__)
            await asyncio.sleep(WATCH_S)

    async def render(self, accept: str = "") -> tuple[str, bytes]:
        """The content type and the text of all metrics, in the format that the Accept header asks for."""

        def in_thread() -> tuple[str, bytes]:
            from shared.platform import prometheus  # noqa: PLC0415 (0.25 s of a start)

            return prometheus.render(self.attributes, self.every(), accept)

        # It takes some milliseconds, and longer the first time, which calls need not wait for.
        return await asyncio.to_thread(in_thread)

    def every(self) -> list[Number | Histogram]:
        """All metrics there are."""
        return [*self._numbers.values(), *self._histograms.values()]

    def shutdown(self, timeout_s: float) -> None:
        """Exports what is left, as far as that goes within the time."""
        if self._export is not None:
            self._export.shutdown(timeout_s)

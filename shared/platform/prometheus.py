"""Metrics as Prometheus reads them. Imported at the first scrape: the client's library takes a quarter of a second."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.samples import Exemplar, Timestamp

from shared.platform.instruments import Histogram, Number
from shared.platform.telemetry import logger

# How Prometheus spells units.
_UNITS = {"s": "seconds", "ms": "milliseconds", "By": "bytes"}

log = logger(__name__)


def render(attributes: Mapping[str, str], metrics: Sequence[Number | Histogram], accept: str) -> tuple[str, bytes]:
    """The content type and the text of all metrics, in the format that the Accept header asks for.

    `attributes` tell what the process is.
    """
    registry = CollectorRegistry()
    registry.register(_Collector(attributes, metrics))
    encode, kind = choose_encoder(accept)
    return kind, encode(registry)


class _Collector:
    def __init__(self, attributes: Mapping[str, str], metrics: Sequence[Number | Histogram]) -> None:
        self._attributes = attributes
        self._metrics = metrics

    def describe(self) -> list[Metric]:
        """Nothing: the registry then does not read every metric once for its names."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All metrics. One that cannot be read is left out: it must not take the others along."""
        attributes = {_spelt(key): value for key, value in self._attributes.items()}
        yield InfoMetricFamily("target", "Target metadata", attributes)
        for each in self._metrics:
            try:
                yield _number(each) if isinstance(each, Number) else _histogram(each)
            except Exception as error:  # noqa: BLE001 (see above)
                log.warning("metric_not_read", metric=each.name, error=type(error).__name__)


def _number(number: Number) -> Metric:
    values = list(number.read())
    names = list(values[0][1]) if values else []
    labels, unit = [_spelt(name) for name in names], _UNITS.get(number.unit, "")
    make = CounterMetricFamily if number.grows else GaugeMetricFamily
    family = make(_spelt(number.name), number.description, labels=labels, unit=unit)
    for value, given in values:
        family.add_metric([given[name] for name in names], value)
    return family


def _histogram(histogram: Histogram) -> Metric:
    unit = _UNITS.get(histogram.unit, "")
    name = _spelt(histogram.name) + (f"_{unit}" if unit else "")
    labels = [_spelt(label) for label in histogram.labels]
    family = HistogramMetricFamily(name, histogram.description, labels=labels, unit=unit)
    ends = [*map(str, histogram.bounds), "+Inf"]
    for series in histogram.series():
        buckets: list[Any] = list(zip(ends, accumulate(series.counts), strict=True))
        if (example := series.example) is not None:
            at = bisect_left(histogram.bounds, example.value)
            ids = {"trace_id": example.trace_id, "span_id": example.span_id}
            buckets[at] = (*buckets[at], Exemplar(ids, example.value, Timestamp(*divmod(example.at_ns, 1_000_000_000))))
        family.add_metric(series.labels, buckets, sum_value=series.total)
    return family


def _spelt(name: str) -> str:
    """The name as Prometheus takes it."""
    return name.replace(".", "_")

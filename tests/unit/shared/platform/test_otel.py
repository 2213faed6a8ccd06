"""OpenTelemetry's own variables: what is exported, and under which name. And a collector that is slow holds up nothing."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from shared.platform import otel, tracing
from shared.platform.metrics import Metrics
from tests.support.logs import capture_logs

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
QUEUE = 64


class Slow(SpanExporter):
    """Takes a batch when it is let, and says how many spans it was handed."""

    def __init__(self) -> None:
        self.handed = 0
        self.let = threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Waits."""
        self.handed += len(spans)
        self.let.wait(60)
        return SpanExportResult.SUCCESS


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    """Spans are recorded for an exporter that takes none, with room for so many."""
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", str(QUEUE))
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "8")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "1")
    exporter = Slow()
    tracing.configure("test", exporter)
    yield exporter
    exporter.let.set()
    tracing.shutdown()


@pytest.mark.parametrize(
    ("told", "traces", "metrics"),
    [
        ({}, False, False),
        ({ENDPOINT: "http://c:4317"}, True, True),
        ({ENDPOINT: "http://c:4317", "OTEL_SDK_DISABLED": "TRUE"}, False, False),
        ({ENDPOINT: "http://c:4317", "OTEL_SDK_DISABLED": "false"}, True, True),
        ({ENDPOINT: "http://c:4317", "OTEL_METRICS_EXPORTER": "none"}, True, False),
        ({ENDPOINT: "http://c:4317", "OTEL_TRACES_EXPORTER": "none", "OTEL_METRICS_EXPORTER": "prometheus, otlp"}, False, True),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True, False),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://c:4317"}, False, True),
    ],
)
def test_what_is_exported_is_chosen_by_variables(
    told: dict[str, str], traces: bool, metrics: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing without an endpoint or an exporter; nothing at all if the SDK is disabled."""
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert (otel.exports("traces"), otel.exports("metrics")) == (traces, metrics)
    assert otel.unsupported() == []


def test_the_name_of_a_process_may_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """OTEL_SERVICE_NAME before OTEL_RESOURCE_ATTRIBUTES before our own; other attributes stay."""
    assert otel.resource("relay")["service.name"] == "relay"
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=other,deployment.environment.name=a%20b")
    assert otel.resource("relay")["service.name"] == "other"
    monkeypatch.setenv("OTEL_SERVICE_NAME", "bank-relay")
    found = otel.resource("relay")
    assert (found["service.name"], found["deployment.environment.name"]) == ("bank-relay", "a b")
    assert (found["service.namespace"], found["service.version"]) == ("foldline", otel.release())


def test_spans_that_a_slow_collector_does_not_take_are_dropped(slow: Slow) -> None:
    """However many there are, whoever ends them does not wait, and the queue stays as small as it may be."""
    traceparent = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    with capture_logs() as lines:
        began = time.thread_time()
        for _ in range(5000):
            span = tracing.start("s", "server", parent=traceparent)
            assert span is not None
            tracing.end(span)
        took_s = time.thread_time() - began
        slow.let.set()
        tracing.shutdown(10)
    assert took_s < 2, "so much processor time does nobody need who does not wait"
    assert 0 < slow.handed <= QUEUE + 8 + 8
    assert len(lines) <= 1, lines


def test_a_slow_collector_does_not_hold_up_the_end(slow: Slow) -> None:
    """A process ends when its time is over, whatever the exporter does."""
    span = tracing.start("s", "server", parent="00-" + "a" * 32 + "-" + "b" * 16 + "-01")
    assert span is not None
    tracing.end(span)
    began = time.monotonic()
    tracing.shutdown(0.2)
    assert time.monotonic() - began < 2
    assert not slow.let.is_set()


def test_metrics_of_a_black_holed_collector_do_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """It accepts a connection and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as hole:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", f"http://127.0.0.1:{hole.getsockname()[1]}")
        monkeypatch.setenv("OTEL_METRIC_EXPORT_TIMEOUT", "500")
        metrics = Metrics("test")
        metrics.gauge("foldline.size", "Size.", lambda: [(5, {})])
        began = time.monotonic()
        metrics.shutdown(0.2)
        assert time.monotonic() - began < 2

"""Spans: which are made, below what, and that nothing happens where nobody asked for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from shared.platform import tracing
from shared.platform.telemetry import trace_id

SAMPLED = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
UNSAMPLED = SAMPLED[:-2] + "00"


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    """Records into memory; `tracing.shutdown` hands over what was recorded."""
    exporter = InMemorySpanExporter()
    yield exporter
    tracing.shutdown()


def test_nothing_is_recorded_unless_asked_for() -> None:
    """Without OpenTelemetry's variables there is no span, and a new trace says that it is not sampled."""
    tracing.configure("test")
    assert not tracing.on()
    assert tracing.start("s", "server", parent=SAMPLED) is None
    traceparent, span = tracing.begin("s", "server")
    assert (traceparent[-2:], span) == ("00", None)


def test_a_span_is_below_its_parent_and_linked(exporter: InMemorySpanExporter) -> None:
    """Kind, trace, parent, links and attributes are those that were given; an error is told by its kind."""
    tracing.configure("test", exporter)
    span = tracing.start("s", "consumer", parent=SAMPLED, links=[SAMPLED], attributes={"a": 1})
    assert span is not None
    inner = tracing.start("inner", "internal", parent=tracing.traceparent_of(span))
    assert inner is not None
    tracing.end(inner, error="UNAVAILABLE")
    tracing.end(span)
    tracing.shutdown()
    below, above = exporter.get_finished_spans()
    assert above.parent is not None
    assert below.parent is not None
    assert (f"{above.context.trace_id:032x}", f"{above.parent.span_id:016x}") == (trace_id(SAMPLED), "00f067aa0ba902b7")
    assert [f"{link.context.span_id:016x}" for link in above.links] == ["00f067aa0ba902b7"]
    assert (above.kind.name, dict(above.attributes or {}), above.status.is_ok) == ("CONSUMER", {"a": 1}, True)
    assert below.parent.span_id == above.context.span_id
    assert (dict(below.attributes or {}), below.status.is_ok) == ({"error.type": "UNAVAILABLE"}, False)
    assert above.resource.attributes["service.name"] == "test"


def test_a_trace_that_its_caller_does_not_record_is_not_recorded_here(exporter: InMemorySpanExporter) -> None:
    """Nor one without a parent's context, such as an event's of an earlier release may be."""
    tracing.configure("test", exporter)
    assert tracing.start("s", "server", parent=UNSAMPLED) is None
    assert tracing.start("s", "server", parent="") is None


@pytest.mark.parametrize("sampler", ["traceidratio", "parentbased_traceidratio"])
@pytest.mark.parametrize(("ratio", "begun"), [("0", set()), ("0.25", {"0", "3"}), ("1", {"0", "3", "4", "f"})])
def test_of_a_ratio_those_traces_are_recorded_that_the_sampler_would_record(
    exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch, sampler: str, ratio: str, begun: set[str]
) -> None:
    """The last 64 bits of the trace's id decide, here as in every other service: without asking, where a look at them will do."""
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", ratio)
    tracing.configure("test", exporter)
    recorded = set()
    for digit in ("0", "3", "4", "f"):
        traceparent = f"00-{'f' * 16}{digit}{'f' * 15}-00f067aa0ba902b7-00"
        monkeypatch.setattr(tracing, "new_traceparent", lambda text=traceparent: text)
        begun_as, span = tracing.begin("s", "server")
        assert begun_as[3:35] == traceparent[3:35]
        if span is not None:
            recorded.add(digit)
            tracing.end(span)
    assert recorded == begun


@pytest.mark.parametrize(("sampler", "flags"), [("parentbased_always_on", "01"), ("parentbased_always_off", "00")])
def test_the_sampler_is_that_of_opentelemetrys_variables(
    exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch, sampler: str, flags: str
) -> None:
    """It decides about traces that begin here, and the trace context says what it decided."""
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
    tracing.configure("test", exporter)
    traceparent, span = tracing.begin("s", "server")
    assert (traceparent[-2:], span is not None) == (flags, flags == "01")
    if span is not None:
        assert tracing.traceparent_of(span) == traceparent
        tracing.end(span)

"""What queries give: the part of PromQL in which the tests evaluate those of dashboards and alerts, beside what promtool says."""

from __future__ import annotations

import math

import pytest

from tests.support.checks.promql import Store

AT_S = 300.0


def store() -> Store:
    """Five minutes of two counters, of a histogram, and of a gauge."""
    made = Store()
    for number in range(11):
        at_s = number * 30.0
        made.add("calls_total", {"method": "a", "code": "OK"}, at_s, 60.0 * number)
        made.add("calls_total", {"method": "a", "code": "INTERNAL"}, at_s, 3.0 * number)
        made.add("calls_total", {"method": "b", "code": "OK"}, at_s, 30.0 * (number % 4))
        for end, count in (("0.1", 1.0), ("0.5", 3.0), ("+Inf", 4.0)):
            made.add("took_bucket", {"le": end}, at_s, count * number)
    made.add("head", {}, AT_S, 7.0)
    made.add("position", {"consumer": "x"}, AT_S, 5.0)
    made.add("position", {"consumer": "y"}, AT_S, 7.0)
    made.add("old", {}, 0.0, 1.0)
    return made


@pytest.mark.parametrize(
    ("query", "given"),
    [
        ("position", {"consumer=x": 5.0, "consumer=y": 7.0}),
        ('position{consumer="x"}', {"consumer=x": 5.0}),
        ('position{consumer!="x"}', {"consumer=y": 7.0}),
        ('position{consumer=~"x|z"}', {"consumer=x": 5.0}),
        ('position{consumer!~"x|z"}', {"consumer=y": 7.0}),
        ("old", {}),
        ("nothing", {}),
        ("absent(nothing)", {"": 1.0}),
        ("absent(head)", {}),
        ("time()", {"": 300.0}),
        ("head - 3 * 2", {"": 1.0}),
        ("scalar(head) - position", {"consumer=x": 2.0, "consumer=y": 0.0}),
        ("scalar(position)", {"": math.nan}),
        ("clamp_min(position - 6, 0)", {"consumer=x": 0.0, "consumer=y": 1.0}),
        ("position > 5", {"consumer=y": 7.0}),
        ("5 < position", {"consumer=y": 7.0}),
        ("position == 5 or position == 7", {"consumer=x": 5.0, "consumer=y": 7.0}),
        ("position > 4 and position < 6", {"consumer=x": 5.0}),
        ("position / (position - 5)", {"consumer=x": math.inf, "consumer=y": 3.5}),
        ("max(position)", {"": 7.0}),
        ("count by (consumer) (position)", {"consumer=x": 1.0, "consumer=y": 1.0}),
        ("sum by (method) (rate(calls_total[1m]))", {"method=a": 2.1, "method=b": 1.0}),
        # Of a counter that began anew, what it came to counts.
        ('rate(calls_total{method="b"}[5m])', {"method=b,code=OK": 7 / 9}),
        ("histogram_quantile(0.5, rate(took_bucket[1m]))", {"": 0.3}),
        ("histogram_quantile(0.99, rate(took_bucket[1m]))", {"": 0.5}),
        ("histogram_quantile(0.5, rate(took_bucket[1m]) * 0)", {"": math.nan}),
    ],
)
def test_a_query_gives(query: str, given: dict[str, float]) -> None:
    """Its series with their values, by their labels."""
    found = {",".join(f"{name}={value}" for name, value in sorted(labels, reverse=True)): it for labels, it in _given(query)}
    assert found == pytest.approx(given, nan_ok=True)


def _given(query: str) -> list[tuple[frozenset[tuple[str, str]], float]]:
    return list(store().vector(query, AT_S + 5.0 if "rate" in query else AT_S).items())


def test_what_an_instance_no_longer_tells_is_gone() -> None:
    """At once, and also for what asks of a time; what others tell stays."""
    made = Store()
    for at_s in (0.0, 15.0):
        for instance in ("one", "two"):
            made.scrape(instance, at_s, [("x_total", {"a": "b"}, at_s), ("y", {}, 1.0)])
    made.scrape("one", 30.0, [("y", {}, 2.0)])
    assert list(made.vector("x_total", 31.0).values()) == [15.0]
    assert made.vector("sum(y)", 31.0) == {frozenset(): 3.0}
    assert len(made.vector("rate(x_total[1m])", 31.0)) == 2
    assert made.names() == {"x_total", "y"}


@pytest.mark.parametrize(
    "query", ["sum without (a) (x)", "x - on (a) y", "x offset 5m", "irate(x[1m])", "x @ 3", "quantile(0.5, x)", "x > bool 1"]
)
def test_what_is_not_known_does_not_pass(query: str) -> None:
    """Whoever writes such a query is told that the tests cannot evaluate it."""
    made = Store()
    made.add("x", {}, AT_S, 1.0)
    made.add("y", {}, AT_S, 1.0)
    with pytest.raises((AssertionError, KeyError)):
        made.vector(query, AT_S)

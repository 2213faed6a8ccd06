"""Evaluates queries of dashboards and alerts over samples, as Prometheus does: the part of PromQL that they use.

What is not known here raises AssertionError, so no query passes for lack of understanding. `make test-containers` has promtool,
which is Prometheus's own, evaluate the same queries over the same samples.
"""

from __future__ import annotations

import math
import operator
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import promql_parser as promql

LOOKBACK_S = 300.0
"""A series without a newer sample is gone."""
_ARITHMETIC: dict[str, Callable[[float, float], float]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
    ">=": operator.ge,
    "<=": operator.le,
}
_GROUPS: dict[str, Callable[[Sequence[float]], float]] = {"sum": math.fsum, "max": max, "min": min, "count": len}

Labels = frozenset[tuple[str, str]]
Vector = dict[Labels, float]
"""The value of each series. Labels have no name."""
Samples = Sequence[tuple[float, float]]
"""The times of one series, in seconds and rising, each with its value."""
GONE = math.nan
"""The value that says that there is no more of a series, as Prometheus notes it (a stale marker)."""


class Store:
    """Samples of series, and what queries say of them."""

    def __init__(self) -> None:
        self._series: dict[str, dict[Labels, list[tuple[float, float]]]] = defaultdict(dict)

    def add(self, name: str, labels: Mapping[str, str], at_s: float, value: float) -> None:
        """Adds the next sample of a series."""
        self._series[name].setdefault(frozenset(labels.items()), []).append((at_s, value))

    def scrape(self, instance: str, at_s: float, page: Iterable[tuple[str, Mapping[str, str], float]]) -> None:
        """Adds what an instance said: names, labels and values. Those of its series that it does not speak of are gone."""
        missing = {(name, labels) for name, every in self._series.items() for labels in every if ("instance", instance) in labels}
        for name, labels, value in page:
            named = {**labels, "instance": instance}
            self.add(name, named, at_s, value)
            missing.discard((name, frozenset(named.items())))
        for gone, known in missing:
            self._series[gone][known].append((at_s, GONE))

    def names(self) -> set[str]:
        """The names of all series."""
        return set(self._series)

    def vector(self, query: str, at_s: float) -> Vector:
        """What a query gives at a moment. A number is a series without labels."""
        result = _Evaluation(self._series, at_s).of(promql.parse(query))
        return result if isinstance(result, dict) else {frozenset(): result}


class _Evaluation:
    """One moment at which queries are evaluated."""

    def __init__(self, series: Mapping[str, Mapping[Labels, Samples]], at_s: float) -> None:
        self._series = series
        self._at_s = at_s

    def of(self, expression: Any) -> Vector | float:
        """The value of an expression."""
        match expression:
            case promql.NumberLiteral():
                return float(expression.val)
            case promql.ParenExpr():
                return self.of(expression.expr)
            case promql.VectorSelector():
                newest = {labels: samples[-1][1] for labels, samples in self._select(expression, LOOKBACK_S)}
                return {labels: value for labels, value in newest.items() if not math.isnan(value)}
            case promql.AggregateExpr():
                return self._aggregate(expression)
            case promql.BinaryExpr():
                assert not str(expression.modifier or ""), f"not known: {expression.modifier}"
                return _combine(str(expression.op), self.of(expression.lhs), self.of(expression.rhs))
            case promql.Call():
                return self._call(expression.func.name, expression.args)
        raise AssertionError(f"not known: {expression}")

    def _select(self, selector: Any, range_s: float) -> Iterator[tuple[Labels, Samples]]:
        """The series that a selector names, each with its samples of a time; those without any are left out."""
        assert selector.offset is None, f"not known: {selector}"
        assert selector.at is None, f"not known: {selector}"
        for labels, samples in self._series.get(selector.name, {}).items():
            found = [sample for sample in samples if self._at_s - range_s < sample[0] <= self._at_s]
            if found and all(_matches(matcher, dict(labels)) for matcher in selector.matchers.matchers):
                yield labels, found

    def _aggregate(self, expression: Any) -> Vector:
        by = re.fullmatch(r"by \((.*)\)", str(expression.modifier or "by ()"))
        assert by is not None, f"not known: {expression.modifier}"
        kept = set(by[1].split(", "))
        groups: dict[Labels, list[float]] = defaultdict(list)
        for labels, value in _vector(self.of(expression.expr)).items():
            groups[frozenset(pair for pair in labels if pair[0] in kept)].append(value)
        return {labels: float(_GROUPS[str(expression.op)](values)) for labels, values in groups.items()}

    def _call(self, name: str, arguments: Sequence[Any]) -> Vector | float:
        match name:
            case "time":
                return self._at_s
            case "scalar":
                values = list(_vector(self.of(arguments[0])).values())
                return values[0] if len(values) == 1 else math.nan
            case "absent":
                equal = {matcher.name: matcher.value for matcher in arguments[0].matchers.matchers}
                return {} if _vector(self.of(arguments[0])) else {frozenset(equal.items()): 1.0}
            case "clamp_min":
                least = self.of(arguments[1])
                assert isinstance(least, float)
                return {labels: max(value, least) for labels, value in _vector(self.of(arguments[0])).items()}
            case "rate":
                range_s = arguments[0].range.total_seconds()
                found = {
                    labels: [sample for sample in samples if not math.isnan(sample[1])]
                    for labels, samples in self._select(arguments[0].vector_selector, range_s)
                }
                return {labels: _rate(samples, range_s, self._at_s) for labels, samples in found.items() if len(samples) > 1}
            case "histogram_quantile":
                quantile = self.of(arguments[0])
                assert isinstance(quantile, float)
                return _quantiles(quantile, _vector(self.of(arguments[1])))
        raise AssertionError(f"not known: {name}")


def _vector(value: Vector | float) -> Vector:
    assert isinstance(value, dict), "a number where a vector should be"
    return value


def _matches(matcher: Any, labels: Mapping[str, str]) -> bool:
    value = labels.get(matcher.name, "")
    if matcher.op in (promql.MatchOp.Re, promql.MatchOp.NotRe):
        return (re.fullmatch(matcher.value, value) is not None) is bool(matcher.op == promql.MatchOp.Re)
    return (value == matcher.value) is bool(matcher.op == promql.MatchOp.Equal)


def _combine(op: str, left: Vector | float, right: Vector | float) -> Vector | float:
    """Both sides of an operator. Of two vectors those series belong together that have the same labels."""
    if isinstance(left, float) and isinstance(right, float):
        return _arithmetic(op, left, right)
    if op == "or":
        return {**_vector(right), **_vector(left)}
    if op == "and":
        return {labels: value for labels, value in _vector(left).items() if labels in _vector(right)}
    if isinstance(left, float):
        pairs: Iterable[tuple[Labels, float, float]] = [(labels, left, value) for labels, value in _vector(right).items()]
    elif isinstance(right, float):
        pairs = [(labels, value, right) for labels, value in left.items()]
    else:
        pairs = [(labels, value, right[labels]) for labels, value in left.items() if labels in right]
    if (holds := _COMPARISONS.get(op)) is not None:  # keeps the series that it holds for, as they are
        kept = operator.itemgetter(2 if isinstance(left, float) else 1)
        return {pair[0]: kept(pair) for pair in pairs if holds(pair[1], pair[2])}
    return {labels: _arithmetic(op, one, other) for labels, one, other in pairs}


def _arithmetic(op: str, one: float, other: float) -> float:
    if op == "/":
        if other:
            return one / other
        return math.nan if one == 0 or math.isnan(one) else math.copysign(math.inf, one)
    return _ARITHMETIC[op](one, other)


def _rate(samples: Samples, range_s: float, at_s: float) -> float:
    """By how much a counter grows each second: up to the ends of the range, if samples are near to them, as in Prometheus."""
    (first_s, first), (last_s, last) = samples[0], samples[-1]
    values = [value for _, value in samples]
    grown = last - first + sum(before for before, after in pairwise(values) if after < before)
    covered_s = last_s - first_s
    between_s = covered_s / (len(samples) - 1)
    before_s, after_s = first_s - (at_s - range_s), at_s - last_s
    if before_s >= between_s * 1.1:
        before_s = between_s / 2
    if grown > 0 and first >= 0:
        before_s = min(before_s, covered_s * first / grown)  # it was not below zero
    if after_s >= between_s * 1.1:
        after_s = between_s / 2
    return grown * (covered_s + before_s + after_s) / covered_s / range_s


def _quantiles(quantile: float, buckets: Vector) -> Vector:
    """The quantile of each histogram, whose buckets are told apart by `le`, as if values were spread evenly in their bucket."""
    histograms: dict[Labels, list[tuple[float, float]]] = defaultdict(list)
    for labels, count in buckets.items():
        end = dict(labels)["le"]
        histograms[frozenset(pair for pair in labels if pair[0] != "le")].append((float(end), count))
    return {labels: _quantile(quantile, sorted(each)) for labels, each in histograms.items()}


def _quantile(quantile: float, buckets: Sequence[tuple[float, float]]) -> float:
    total = buckets[-1][1]
    if buckets[-1][0] != math.inf or len(buckets) < 2 or not total:
        return math.nan
    rank = quantile * total
    at = next(number for number, (_, count) in enumerate(buckets) if count >= rank)
    if at == len(buckets) - 1:
        return buckets[-2][0]
    begin, below = buckets[at - 1] if at else (0.0, 0.0)
    end, count = buckets[at]
    return begin + (end - begin) * (rank - below) / (count - below)

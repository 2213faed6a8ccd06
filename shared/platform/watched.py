"""Numbers that a database must be asked for: asked every few seconds, and read by whoever scrapes in between."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping

from shared.platform.instruments import Labels
from shared.platform.metrics import Metrics

Values = Mapping[str, Iterable[tuple[float, Labels]]]
"""By the name of the metric: its values, each with its labels."""


def watch(metrics: Metrics, described: Mapping[str, tuple[str, str]], ask: Callable[[], Awaitable[Values]]) -> None:
    """Makes gauges of what `ask` returns, which is called every few seconds.

    `described` has for each name the unit and what it means. Until the first answer there are no values; while the database is
    away they stay as they were.
    """
    known: dict[str, list[tuple[float, Labels]]] = {name: [] for name in described}

    async def refresh() -> None:
        for name, values in (await ask()).items():
            known[name] = list(values)

    for name, (unit, text) in described.items():
        metrics.gauge(name, text, lambda name=name: known[name], unit=unit)  # type: ignore[misc]
    metrics.watch(refresh)

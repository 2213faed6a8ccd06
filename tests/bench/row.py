"""What a row of the report is: a measurement beside its ceiling, and the floor that it is held to."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from tests.bench.stage import Stage


@dataclass(slots=True, kw_only=True)
class Sample:
    """One round of a row. `cpu_us` is processor time for each command or event, by process."""

    figure: float
    ceiling: float
    cpu_us: dict[str, float] = field(default_factory=dict)
    ceiling_cpu_us: dict[str, float] = field(default_factory=dict)
    notes: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Figure by ceiling."""
        return self.figure / self.ceiling


Measure = Callable[[Stage, float], AsyncGenerator[Sample, None]]
"""Sets up what a row needs, then yields one sample a round, for ever; `scale` shortens or stretches each."""


NOISE = 0.03
"""By so much the median of a row differs from run to run on a quiet machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A line of the report. Without a floor it is reported and nothing more."""

    name: str
    title: str
    unit: str
    ceiling: str
    measure: Measure
    floor: float | None = None
    # The floor is an upper bound: the figure is a time.
    less_is_better: bool = False
    # An upper bound of the figure itself, in its unit, where the ratio says little.
    figure_max: float | None = None
    # Seen elsewhere, on another day: not measured here.
    peer: str = ""

    @property
    def bound(self) -> str:
        """The floor as it is shown; empty if there is none."""
        if self.figure_max is not None:
            return f"≤ {self.figure_max:.0f}{self.unit}"
        return "" if self.floor is None else f"{'≤' if self.less_is_better else '≥'} {self.floor:.2f}"

    def passes(self, ratio: float, figure: float) -> bool:
        """Whether the row is on the right side of its floor, or within NOISE of it."""
        if self.figure_max is not None:
            return figure <= self.figure_max * (1 + NOISE)
        if self.floor is None:
            return True
        return ratio <= self.floor * (1 + NOISE) if self.less_is_better else ratio >= self.floor * (1 - NOISE)


async def in_turn(nth: int, *measures: Callable[[], Awaitable[Any]]) -> list[Any]:
    """Takes each, one after another; every second time from the last to the first."""
    answers = [await measure() for measure in (measures if nth % 2 == 0 else reversed(measures))]
    return answers if nth % 2 == 0 else answers[::-1]

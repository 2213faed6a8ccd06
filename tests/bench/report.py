"""What the bench prints, and what it writes into out/bench.json."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.bench.row import Row, Sample
from tests.bench.rows import GATED

Results = Mapping[str, Sequence[Sample]]

MEMORY_MIB_MAX = {"idle_mib_": 150.0, "mib_": 300.0}
"""The bounds of each process, by the beginning of the note that holds it."""


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def _spread(values: Sequence[float], unit: str) -> str:
    return f"{_number(median(values))}{unit} [dim]({_number(min(values))}-{_number(max(values))})[/]"


def _by_process(costs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: round(median(cost[name] for cost in costs), 1) for name in costs[0]} if costs else {}


def ratio(samples: Sequence[Sample]) -> float:
    """The median of the rounds' own ratios: both sides of each were taken within seconds of each other."""
    return median(sample.ratio for sample in samples)


def _passes(row: Row, samples: Sequence[Sample]) -> bool:
    return row.passes(ratio(samples), median(sample.figure for sample in samples))


def missed(rows: Sequence[Row], results: Results) -> list[str]:
    """What is on the wrong side of its floor."""
    found = [row.name for row in rows if row.name in results and not _passes(row, results[row.name])]
    for prefix, most in MEMORY_MIB_MAX.items():
        notes = [sample.notes for samples in results.values() for sample in samples]
        worst = {
            name: value for each in notes for name, value in sorted(each.items()) if name.startswith(prefix) and value > most
        }
        found += [f"{name} {value:.0f} MiB > {most:.0f}" for name, value in worst.items()]
    return found


def show(console: Console, rows: Sequence[Row], results: Results) -> None:
    """Prints the figures beside their ceilings, then what each command cost, by process, and the notes."""
    figures = Table(title="Foldline beside the bare machinery: medians (least-most)", title_justify="left")
    for name in ("", "figure", "ceiling", "ratio", "floor", ""):
        figures.add_column(name, justify="left" if not name else "right")
    costs = Table(title="Processor time, µs for each command or event: medians", title_justify="left")
    for name in ("", "figure", "ceiling"):
        costs.add_column(name)
    for row in rows:
        if not (samples := results.get(row.name)):
            continue
        verdict = "" if not row.bound else "[green]pass[/]" if _passes(row, samples) else "[red]MISS[/]"
        ceiling = _spread([sample.ceiling for sample in samples], row.unit)
        figures.add_row(
            row.title + (f"\n[dim]seen elsewhere: {row.peer}[/]" if row.peer else ""),
            _spread([sample.figure for sample in samples], row.unit),
            f"{ceiling}\n[dim]{row.ceiling}[/]",
            _spread([sample.ratio for sample in samples], ""),
            row.bound,
            verdict,
        )
        costs.add_row(
            row.title,
            _costs([sample.cpu_us for sample in samples]),
            _costs([sample.ceiling_cpu_us for sample in samples]),
        )
    console.print(figures)
    console.print(costs)
    notes = Table(title="Beside that: medians", title_justify="left", show_header=False)
    for row in rows:
        if found := _by_process([sample.notes for sample in results.get(row.name, ())]):
            notes.add_row(row.title, "  ".join(f"{name} {value:,.2f}" for name, value in found.items()))
    console.print(notes)


def _costs(costs: Sequence[Mapping[str, float]]) -> str:
    return "  ".join(f"{name} {value:,.0f}" for name, value in _by_process(costs).items())


def write(file: Path, rows: Sequence[Row], results: Results) -> None:
    """Writes every round of every row, and the ratios that are gates."""
    content: dict[str, Any] = {
        "machine": {"cpus": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()},
        "ratios": {name: round(ratio(results[name]), 3) for name in GATED if name in results},
        "floors": {row.name: row.bound for row in rows if row.bound},
        "missed": missed(rows, results),
        "rows": {
            row.name: {
                "title": row.title,
                "unit": row.unit.strip(),
                "ceiling": row.ceiling,
                "ratio": round(ratio(samples), 3),
                "figure": median(sample.figure for sample in samples),
                "ceiling_figure": median(sample.ceiling for sample in samples),
                "rounds": [{**asdict(sample), "ratio": round(sample.ratio, 4)} for sample in samples],
            }
            for row in rows
            if (samples := results.get(row.name))
        },
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n")

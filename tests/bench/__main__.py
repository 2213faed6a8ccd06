"""`python -m tests.bench`: measures Foldline beside its ceilings. Exits 1 if a floor is missed or a row fails."""

from __future__ import annotations

import argparse
import asyncio
import sys
from contextlib import aclosing
from pathlib import Path

import psycopg
from rich.console import Console

from tests.bench import aggregate_load, crowds, healing, lone_append, lone_round, pipeline, queries, report, telemetry, watching
from tests.bench.row import Row, Sample
from tests.bench.rows import ROWS as CEILINGS
from tests.bench.stage import Stage, on_stage, own_engines, own_folder
from tests.bench.versus_peers import ROWS as VERSUS_PEERS
from tests.support.system.engines import Engines

ROWS = (
    *CEILINGS,
    *crowds.ROWS,
    aggregate_load.ROW,
    lone_append.ROW,
    lone_round.ROW,
    healing.ROW,
    pipeline.ROW,
    *telemetry.ROWS,
    *queries.ROWS,
    *watching.ROWS,
    *VERSUS_PEERS,
)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="rows to measure, or how their names begin; all if none")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each row (default 9; fewer say little)")
    parser.add_argument("--scale", type=float, default=1.0, help="how long each measurement is, by the usual time")
    parser.add_argument("--out", type=Path, default=Path("out/bench.json"), help="where to write every round")
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    return parser.parse_args()


async def measure(
    folder: Path, engines: Engines, rows: list[Row], rounds: int, scale: float, console: Console
) -> dict[str, list[Sample]]:
    """Takes the rows one after another. One that fails is told and left out: the others are measured all the same."""
    results: dict[str, list[Sample]] = {}
    async with on_stage(folder, engines) as stage:
        for row in rows:
            try:
                results[row.name] = await _take(stage, row, rounds, scale, console)
            except (RuntimeError, OSError, psycopg.Error) as error:
                console.print(f"  [red]{row.name} failed:[/] {error}", highlight=False)
            else:
                console.print(f"  {row.name}: {report.ratio(results[row.name]):.2f}", highlight=False)
            await stage.end_row()
    return results


async def _take(stage: Stage, row: Row, rounds: int, scale: float, console: Console) -> list[Sample]:
    """The rounds of a row, after one that is not counted."""
    samples: list[Sample] = []
    what = f"{row.title} / {row.ceiling}"
    async with aclosing(row.measure(stage, scale)) as taking:
        with console.status(f"{what}: warming up") as status:
            await anext(taking)
            while len(samples) < rounds:
                samples.append(await anext(taking))
                status.update(f"{what}: {len(samples)} of {rounds}, {samples[-1].ratio:.2f}")
    return samples


def main() -> int:
    """Measures, prints, writes."""
    arguments, console = _arguments(), Console()
    rows = [row for row in ROWS if not arguments.rows or row.name.startswith(tuple(arguments.rows))]
    if arguments.list or not rows:
        console.print("\n".join(row.name for row in ROWS))
        return 0 if arguments.list else 2
    with own_folder() as folder, own_engines(folder) as engines:
        results = asyncio.run(measure(folder, engines, rows, arguments.rounds, arguments.scale, console))
    report.show(console, rows, results)
    report.write(arguments.out, rows, results)
    console.print(f"Every round is in {arguments.out}.")
    if missed := report.missed(rows, results):
        console.print(f"[red]Below their floors: {', '.join(missed)}[/]")
    return 1 if missed or len(results) < len(rows) else 0


if __name__ == "__main__":
    sys.exit(main())

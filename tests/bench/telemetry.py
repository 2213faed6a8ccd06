"""What telemetry costs a command of `unary_64`: off, on without a sample, on for every call, and while the collector hangs.

The figure is commands for each second of the write service's processor, which says the same as their rate where the processor
is what runs out, and says it more exactly. All is measured in one process, in short turns: see `switched_write_service.py`.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncGenerator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from deploy.local.system import WRITE, System
from tests.bench import workload
from tests.bench.children import Answer
from tests.bench.row import Row, Sample, in_turn
from tests.bench.stage import Stage
from tests.bench.switched_write_service import CALLS_OF_A_TURN, OFF, SAMPLE_ALL, SAMPLED, TAKE_TURNS, UNSAMPLED
from tests.support.system.collector import Collector, collecting

SECONDS = 4.0
SAMPLED_S = 1.0
HANGING_S = 2.0
# The collector's settings have spans sent every 200 ms.
EXPORTED_WITHIN_S = 0.3
Turn = dict[str, Any]
"""Its way, and the seconds that it took of the processor and of the clock: `cpu_s` and `wall_s`."""
CALL = "bank.v1.AccountService/DepositMoney"


async def telemetry(stage: Stage, scale: float) -> AsyncGenerator[Sample, None]:
    """A load while traces are off and on in turns, then one while every call is sampled.

    The ratio of a round is the median of those of neighbouring turns. The calls bring no trace of their own: so the sampler is
    asked, which costs more than taking a caller's word. Raises RuntimeError if spans come of calls that are not sampled, or
    none of those that are.
    """
    async with collecting() as collector:
        file = stage.folder / "turns"
        system = await _system(stage, collector, file)
        while True:
            collector.spans.clear()
            turns, _ = await _loaded(stage, system, file, TAKE_TURNS, SECONDS * scale)
            if collector.spans:
                raise RuntimeError(f"{len(collector.spans)} spans came of calls that are not sampled")
            sampled, answer = await _loaded(stage, system, file, SAMPLE_ALL, SAMPLED_S * scale)
            recorded = await _recorded(collector)
            pairs = [(one, other) for one, other in pairwise(turns) if one["way"] == OFF]
            off_us = median(_us(turn, "cpu_s") for turn in turns if turn["way"] == OFF)
            ratio = median(off["cpu_s"] / on["cpu_s"] for off, on in pairs)
            sampled_us = median(_us(turn, "cpu_s") for turn in sampled if turn["way"] == SAMPLED)
            yield Sample(
                figure=ratio * 1e6 / off_us,
                ceiling=1e6 / off_us,
                cpu_us={WRITE: round(off_us / ratio, 1)},
                ceiling_cpu_us={WRITE: round(off_us, 1)},
                notes={
                    **{f"{way}_per_s": _per_s(turns + sampled, way) for way in (OFF, UNSAMPLED, SAMPLED)},
                    "sampled_us": sampled_us,
                    "off_vs_sampled": off_us / sampled_us,
                    "recorded": recorded / answer["sent"],
                    "pairs": len(pairs),
                },
            )


async def unanswered(stage: Stage, scale: float) -> AsyncGenerator[Sample, None]:
    """A load of which every call is sampled, while the collector takes the spans and answers nothing, beside one that answers.

    The queue of spans is full within the first half second of it.
    """
    async with collecting() as collector:
        file = stage.folder / "turns"
        system = await _system(stage, collector, file)
        nth = 0

        async def load(*, hangs: bool) -> float:
            if hangs:
                collector.answers.clear()
            try:
                turns, _ = await _loaded(stage, system, file, SAMPLE_ALL, HANGING_S * scale)
            finally:
                collector.answers.set()
            await _recorded(collector)
            collector.spans.clear()
            return median(_us(turn, "cpu_s") for turn in turns if turn["way"] == SAMPLED)

        while True:
            hanging_us, answering_us = await in_turn(nth, partial(load, hangs=True), partial(load, hangs=False))
            costs = {"cpu_us": {WRITE: round(hanging_us, 1)}, "ceiling_cpu_us": {WRITE: round(answering_us, 1)}}
            yield Sample(figure=1e6 / hanging_us, ceiling=1e6 / answering_us, **costs)
            nth += 1


async def _system(stage: Stage, collector: Collector, file: Path) -> System:
    """A write service that takes turns."""
    system = await stage.system(settings={**collector.settings(), "TURNS_FILE": str(file)})
    system.add(replace(system.programs[WRITE], module="tests.bench.switched_write_service"))
    system.start(WRITE)
    await system.wait_ready(WRITE)
    await stage.order(system, "set_up", accounts=1000, batch=250)
    return system


async def _loaded(stage: Stage, system: System, file: Path, ask: signal.Signals, seconds: float) -> tuple[list[Turn], Answer]:
    """The turns during a load of 64 callers, and what the callers saw."""
    system.send_signal(WRITE, ask)
    load: dict[str, float] = {"callers": 64, "accounts": 1000, "seconds": seconds, "warm_s": 0.1}
    _lines(file)
    answer = await stage.order(system, "unary", method=workload.DEPOSIT, traceparent="", **load)
    # The first turn began when there was no load.
    return [json.loads(line) for line in _lines(file)[1:]], answer


def _lines(file: Path) -> list[str]:
    """The lines of a file, which is empty then."""
    lines = file.read_text().splitlines()
    file.write_bytes(b"")
    return lines


def _us(turn: Turn, which: str) -> float:
    """Microseconds of a call."""
    return 1e6 * float(turn[which]) / CALLS_OF_A_TURN


def _per_s(turns: list[Turn], way: str) -> float:
    """Calls a second."""
    return 1e6 / median(_us(turn, "wall_s") for turn in turns if turn["way"] == way)


async def _recorded(collector: Collector) -> int:
    """How many calls the collector was told of, when no more spans come. Raises RuntimeError if there are none."""
    before = -1
    while len(collector.spans) > before:
        before = len(collector.spans)
        await asyncio.sleep(2 * EXPORTED_WITHIN_S)
    if not before:
        raise RuntimeError("no span came of the calls that are sampled")
    return sum(seen.name == CALL for seen in collector.spans)


ROWS = (
    Row(
        name="telemetry_off_vs_on",
        title="DepositMoney, 64 callers, traces on, no call sampled: commands a second of the processor",
        unit="/s",
        ceiling="traces off",
        measure=telemetry,
        floor=0.97,
    ),
    Row(
        name="telemetry_unanswered",
        title="DepositMoney, 64 callers, every call sampled, the collector hangs: commands a second of the processor",
        unit="/s",
        ceiling="the collector answers",
        measure=unanswered,
        floor=0.97,
    ),
)

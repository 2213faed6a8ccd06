"""What telemetry costs a command of `unary_64`: off, on for a call that is not sampled, and on for every call.

The figure is commands for each second of the write service's processor, which says the same as their rate where the processor
is what runs out, and says it more exactly. The three take turns in one process: see `switched_write_service.py`.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from statistics import median

from deploy.local.system import WRITE, System
from tests.bench import workload
from tests.bench.children import Meter
from tests.bench.rows import Row, Sample
from tests.bench.stage import Stage
from tests.bench.switched_write_service import OFF, SAMPLED, UNSAMPLED
from tests.support.system.collector import Collector, collecting

SLICE_S = 0.2
# What grows or slows down meanwhile weighs on both alike.
GROUP = (OFF, UNSAMPLED, UNSAMPLED, OFF)
GROUPS = 8
# The collector's settings have spans sent every 200 ms.
EXPORTED_WITHIN_S = 0.3
CALL = "bank.v1.AccountService/DepositMoney"


@dataclass(slots=True)
class Spent:
    """What commands took, over all slices of one way."""

    commands: float = 0.0
    cpu_us: float = 0.0
    done: float = 0.0
    seconds: float = 0.0

    @property
    def us(self) -> float:
        """Processor time of a command, in microseconds."""
        return self.cpu_us / self.commands

    @property
    def per_s(self) -> float:
        """Commands a second."""
        return self.done / self.seconds


async def telemetry(stage: Stage, scale: float) -> AsyncGenerator[Sample, None]:
    """Slices with traces off and slices of unsampled calls take turns, then one of sampled calls ends the round.

    The ratio of a round is the median of those of neighbouring slices. The calls bring no trace of their own: so the sampler is
    asked, which costs more than taking a caller's word. Raises RuntimeError if spans come of calls that are not sampled, or
    none of those that are.
    """
    async with collecting() as collector:
        system = await _system(stage, collector)
        while True:
            collector.spans.clear()
            groups = []
            for _ in range(GROUPS):
                spent = {OFF: Spent(), UNSAMPLED: Spent()}
                for way in GROUP:
                    await _slice(stage, system, way, SLICE_S * scale, spent[way])
                groups.append((spent[OFF], spent[UNSAMPLED]))
            if collector.spans:
                raise RuntimeError(f"{len(collector.spans)} spans came of calls that are not sampled")
            await _slice(stage, system, SAMPLED, 4 * SLICE_S * scale, sampled := Spent())
            recorded = await _recorded(collector)
            off_us, ratio = median(off.us for off, _ in groups), median(off.us / on.us for off, on in groups)
            yield Sample(
                figure=ratio * 1e6 / off_us,
                ceiling=1e6 / off_us,
                cpu_us={WRITE: round(off_us / ratio, 1)},
                ceiling_cpu_us={WRITE: round(off_us, 1)},
                notes={
                    "off_per_s": median(off.per_s for off, _ in groups),
                    "unsampled_per_s": median(on.per_s for _, on in groups),
                    "sampled_per_s": sampled.per_s,
                    "sampled_us": sampled.us,
                    "off_vs_sampled": off_us / sampled.us,
                    "recorded": recorded / sampled.commands,
                },
            )


async def _recorded(collector: Collector) -> int:
    """How many calls the collector was told of, when no more spans come. Raises RuntimeError if there are none."""
    before = -1
    while len(collector.spans) > before:
        before = len(collector.spans)
        await asyncio.sleep(2 * EXPORTED_WITHIN_S)
    if not before:
        raise RuntimeError("no span came of the calls that are sampled")
    return sum(seen.name == CALL for seen in collector.spans)


async def _system(stage: Stage, collector: Collector) -> System:
    """A write service that can be switched, warm each way."""
    system = await stage.system(settings=collector.settings())
    system.add(replace(system.programs[WRITE], module="tests.bench.switched_write_service"))
    system.start(WRITE)
    await system.wait_ready(WRITE)
    await stage.order(system, "set_up", accounts=1000, batch=250)
    return system


async def _slice(stage: Stage, system: System, way: signal.Signals, seconds: float, spent: Spent) -> None:
    """A load of 64 callers, added to what was spent this way."""
    system.send_signal(WRITE, way)
    meter = Meter({WRITE: system.pid(WRITE)})
    load: dict[str, float] = {"callers": 64, "accounts": 1000, "seconds": seconds, "warm_s": 0.05}
    answer = await stage.order(system, "unary", method=workload.DEPOSIT, traceparent="", **load)
    spent.cpu_us += meter.per_command_us(1)[WRITE]
    spent.commands += answer["sent"]
    spent.done += answer["done"]
    spent.seconds += seconds


ROW = Row(
    name="telemetry_off_vs_on",
    title="DepositMoney, 64 callers, traces on, no call sampled: commands a second of the processor",
    unit="/s",
    ceiling="traces off",
    measure=telemetry,
    floor=0.97,
)

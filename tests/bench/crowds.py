"""More callers than there is room for: what one tenant's flood costs another, and what is served of five times too much."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from deploy.local.system import WRITE, System
from shared.commands.committer import SHARED_MAX
from shared.commands.intake import Limits
from tests.bench import workload
from tests.bench.children import Answer, Child, memory_mib
from tests.bench.row import Row, Sample
from tests.bench.stage import Stage

NEIGHBOUR = "neighbour"
OFFERED = 5.0
REFUSED_WITHIN_MS = 50.0


async def fairness(stage: Stage, scale: float) -> AsyncGenerator[Sample, None]:
    """The p99 of a tenant with 20 commands a second, less one batch, while another keeps 16 batches of 256 under way.

    The ceiling is its p99 alone. The note `same_tenant_p99_ms` is the control: the same 20 commands a second, sent by the
    tenant that floods, which therefore stand behind its batches.
    """
    system, flooder = await stage.system(WRITE), await stage.child("load")
    for tenant in (workload.TENANT, NEIGHBOUR):
        await stage.order_from(stage.load, tenant, system, "set_up", accounts=1000, batch=250)
    while True:
        alone = await _paced(stage, system, NEIGHBOUR, scale)
        flooded, flood = await _flooded(stage, system, flooder, NEIGHBOUR, scale)
        control, _ = await _flooded(stage, system, flooder, workload.TENANT, scale)
        batch_ms = 1000 * SHARED_MAX / flood["per_s"]
        yield Sample(
            figure=max(flooded["p99_ms"] - batch_ms, 0.0),
            ceiling=alone["p99_ms"],
            notes={
                "p50_ms": flooded["p50_ms"],
                "alone_p50_ms": alone["p50_ms"],
                "same_tenant_p99_ms": control["p99_ms"],
                "batch_ms": batch_ms,
                "flood_per_s": flood["per_s"],
            },
        )


async def _paced(stage: Stage, system: System, tenant: str, scale: float) -> Answer:
    load: dict[str, float] = {"batch": 1, "rate": 20.0, "seconds": 5 * scale, "warm_s": 0.5}
    return await stage.order_from(stage.load, tenant, system, "paced", method=workload.DEPOSIT, **load)


async def _flooded(stage: Stage, system: System, flooder: Child, tenant: str, scale: float) -> tuple[Answer, Answer]:
    """What the tenant sees under a flood that begins before and ends after it, and the flood itself."""
    load: dict[str, float] = {"callers": 16, "batch": 256, "seconds": 5 * scale + 1.5, "warm_s": 0.5}
    flood = asyncio.create_task(stage.order_from(flooder, workload.TENANT, system, "batch", method=workload.SEND_BATCH, **load))
    await asyncio.sleep(0.5)
    seen = await _paced(stage, system, tenant, scale)
    return seen, await flood


async def overload(stage: Stage, scale: float) -> AsyncGenerator[Sample, None]:
    """Commands that are carried out when five times as many are offered as there are at the peak, in batches of 100.

    A round fails if the p99 of refusals is later than 50 ms. The service's memory is bounded as everywhere (report.py).
    """
    system = await stage.system(WRITE)
    await stage.order(system, "set_up", accounts=1000, batch=250)
    load: dict[str, float] = {"batch": 100, "seconds": 3 * scale, "warm_s": 0.5}
    while True:
        peak = await stage.order(system, "batch", method=workload.SEND_BATCH, callers=8, **load)
        rate = OFFERED * peak["per_s"] / 100
        # Long enough to fill the queue, else nothing is refused.
        longer = {**load, "seconds": max(load["seconds"], 2 * Limits().queue_commands_max / (100 * rate))}
        offered = await stage.order(system, "paced", method=workload.SEND_BATCH, rate=rate, **longer)
        if offered["refused_p99_ms"] > REFUSED_WITHIN_MS:
            raise RuntimeError(f"refusals took {offered['refused_p99_ms']:.0f} ms (p99)")
        yield Sample(
            figure=offered["per_s"],
            ceiling=peak["per_s"],
            notes={
                "refused_p99_ms": offered["refused_p99_ms"],
                "refused": offered["refused"],
                "p50_ms": offered["p50_ms"],
                "mib_write_service": round(memory_mib(system.pid(WRITE)), 1),
            },
        )


ROWS = (
    Row(
        name="fairness",
        title="p99 of 20 commands/s beside another tenant's flood, less one batch",
        unit=" ms",
        ceiling="alone",
        measure=fairness,
        floor=3.0,
        less_is_better=True,
    ),
    Row(
        name="overload",
        title="commands carried out of 5 x the peak rate offered, SendBatch of 100",
        unit="/s",
        ceiling="the peak rate",
        measure=overload,
        floor=0.8,
    ),
)

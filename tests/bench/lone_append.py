"""What `append_one` saves: a command with its one event, appended by it, beside the same appended by `append_batch`.

A second SQL function that writes the line must be worth its upkeep. The two take turns on one connection, each statement
durable when it returns, so that whatever slows the machine down slows both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from uuid import uuid4

from deploy.local.system import WRITE
from shared.commands import append as appending
from shared.commands.append import Batch
from shared.platform.postgres import Connection, connect
from tests.bench.row import Row, Sample
from tests.bench.stage import Stage
from tests.support.domains.trial import lone

SECONDS = 2.0


async def lone_append(stage: Stage, scale: float) -> AsyncGenerator[Sample, None]:
    """Medians of as many pairs as fit in the time."""
    system = await stage.system(WRITE)
    async with await connect(system.databases.write.app, application_name="bench") as connection:
        while True:
            one_ms: list[float] = []
            batch_ms: list[float] = []
            end = time.perf_counter() + SECONDS * scale
            while time.perf_counter() < end:
                one_ms.append(await _took_ms(connection, _by_append_one))
                batch_ms.append(await _took_ms(connection, _by_append_batch))
            yield Sample(figure=statistics.median(one_ms), ceiling=statistics.median(batch_ms), notes={"pairs": len(one_ms)})


async def _took_ms(connection: Connection, append: Callable[[Connection, Batch], Awaitable[object]]) -> float:
    batch = lone(("acme", "counter", str(uuid4())))
    began = time.perf_counter()
    await append(connection, batch)
    return 1000 * (time.perf_counter() - began)


async def _by_append_one(connection: Connection, batch: Batch) -> object:
    return await appending.append(connection, 1, batch)


async def _by_append_batch(connection: Connection, batch: Batch) -> object:
    return await appending._APPEND.row(connection, appending._arrays(1, False, batch))


ROW = Row(
    name="lone_append",
    title="a command with its one event, appended by append_one",
    unit=" ms",
    ceiling="by append_batch",
    measure=lone_append,
    floor=1.0,
    less_is_better=True,
)

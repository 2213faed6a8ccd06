"""What an event costs behind the caller, in processor time, by process: until tables and processes have taken it.

The ceiling is the broker's bare part: one message published and taken twice. The rest is what is done with the events.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator

import psycopg

from deploy.local.system import PROJECTOR, RELAY, SAGA, WRITE, System
from tests.bench import workload
from tests.bench.children import Answer, Meter
from tests.bench.row import Row, Sample
from tests.bench.stage import Stage, head

PROGRAMS = (WRITE, RELAY, PROJECTOR, SAGA)
GIVE_UP_S = 120.0
# What a deposit's message weighs in the stream, about.
MESSAGE_BYTES = 450
CONSUMERS = 2


async def pipeline(stage: Stage, scale: float) -> AsyncGenerator[Sample, None]:
    """Deposits in batches by four callers at full rate, until all consumers are at the head."""
    system = await stage.system(*PROGRAMS)
    await stage.order(system, "set_up", accounts=1000, batch=250)
    await _taken(system, await head(system.databases.write))
    bare = await stage.child("bare_stream", stage.engines.nats_url)
    while True:
        ours = await _loaded(stage, system, 2.0 * scale)
        loops = await bare.ask({"messages": int(ours["events"]), "bytes": MESSAGE_BYTES})
        cost = {name.removeprefix("cpu_"): us for name, us in ours.items() if name.startswith("cpu_")}
        ceiling = {"publish": loops["publish_us"], "consume": loops["consume_us"]}
        yield Sample(
            figure=sum(cost.values()),
            ceiling=loops["publish_us"] + CONSUMERS * loops["consume_us"],
            cpu_us=cost,
            ceiling_cpu_us={name: round(us, 1) for name, us in ceiling.items()},
            notes={"events": ours["events"], "events_per_s": ours["per_s"], "behind_s": ours["behind_s"]},
        )


async def _loaded(stage: Stage, system: System, seconds: float) -> Answer:
    meter = Meter({**stage.pids(system, *PROGRAMS), "nats": stage.nats_pid})
    before, began = await head(system.databases.write), time.perf_counter()
    await stage.order(
        system, "batch", method=workload.SEND_BATCH, callers=4, accounts=1000, batch=100, seconds=seconds, warm_s=0.0
    )
    sent_at, end = time.perf_counter(), await head(system.databases.write)
    await _taken(system, end)
    done_at, events = time.perf_counter(), end - before
    cost = {f"cpu_{name}": us for name, us in meter.per_command_us(events).items()}
    return {**cost, "events": events, "per_s": round(events / (done_at - began), 1), "behind_s": round(done_at - sent_at, 2)}


async def _taken(system: System, position: int) -> None:
    """Waits until the query tables and the processes have taken the event at this position."""
    deadline = time.monotonic() + GIVE_UP_S
    queries = (
        (system.databases.read.admin, "SELECT min(position) FROM checkpoints WHERE serves"),
        (system.databases.saga.admin, "SELECT min(position) FROM checkpoints WHERE name = 'processes'"),
    )
    for url, query in queries:
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as watch:
            while True:
                row = await (await watch.execute(query)).fetchone()
                if row is not None and row[0] is not None and row[0] >= position:
                    break
                if time.monotonic() > deadline:
                    raise RuntimeError(f"position {position} was not taken within {GIVE_UP_S:.0f} s")
                await watch.execute("SELECT pg_sleep(0.02)")


ROW = Row(
    name="pipeline_us_per_event",
    title="an event behind the caller, in batches, all processes",
    unit=" µs",
    ceiling="bare publish and two bare pulls",
    measure=pipeline,
    less_is_better=True,
    figure_max=200,
)

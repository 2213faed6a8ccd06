"""Transfers from start to completed, by all of Foldline's processes and by DBOS: how many a second, and how long each takes.

DBOS runs in an environment of its own, `.venv-bench`, that `make bench` makes; the other rows do without it.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

import psycopg

from deploy.bootstrap import with_database
from deploy.local.system import PROJECTOR, READ, RELAY, SAGA, WRITE, System
from shared.platform.identity import Role
from tests.bench import workload
from tests.bench.children import Answer, Child, Meter, memory_mib
from tests.bench.rows import Row, Sample, _costs, in_turn
from tests.bench.stage import Stage

ROOT = Path(__file__).resolve().parents[2]
PEER_PYTHON = ROOT / ".venv-bench/bin/python"
PROGRAMS = (WRITE, RELAY, READ, PROJECTOR, SAGA)
PACE_PER_S = 50.0


async def _child(stage: Stage, *command: str) -> Child:
    """A process of the bench that is started otherwise than the others."""
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    child = Child(process)
    stage._children.append(child)
    return child


async def _peer(stage: Stage) -> Child:
    """DBOS, on a database of its own on the same server."""
    if not PEER_PYTHON.exists():
        raise RuntimeError(f"{PEER_PYTHON} is not there: `make peer` makes it, or name the rows that do without")
    database = f"peer_dbos_{len(stage._children)}"
    async with await psycopg.AsyncConnection.connect(stage.engines.admin_url, autocommit=True) as admin:
        await admin.execute(f"CREATE DATABASE {database}".encode())
    script = Path(__file__).with_name("peer_dbos.py")
    return await _child(stage, str(PEER_PYTHON), str(script), with_database(stage.engines.admin_url, database))


async def _ours(stage: Stage) -> tuple[System, Child]:
    """All of Foldline's processes, with accounts that have money, and who will call them."""
    system = await stage.system(*PROGRAMS)
    token = system.token(workload.TENANT, workload.USER, [Role.USER, Role.READER])
    addresses = [system.programs[name].address for name in (WRITE, READ)]
    caller = await _child(stage, sys.executable, "-m", "tests.bench.transfers", *addresses, stage.engines.nats_url, token)
    await caller.ask({"kind": "set_up"})
    return system, caller


async def _foldline(stage: Stage, system: System, caller: Child, kind: str, transfers: int) -> Answer:
    meter = Meter(stage.pids(system, *PROGRAMS) | {"nats": _pid_of_nats(stage)})
    answer = await caller.ask({"kind": kind, "transfers": transfers, "per_s": PACE_PER_S})
    cost = {f"cpu_{name}": us for name, us in meter.per_command_us(transfers).items()}
    memory = {f"mib_{name}": round(memory_mib(system.pid(name)), 1) for name in PROGRAMS}
    return {**answer, **cost, **memory, "cpu_load": answer["cpu_us"]}


async def _dbos(stage: Stage, system: System, peer: Child, kind: str, transfers: int) -> Answer:
    meter = Meter(stage.pids(system))
    answer = await peer.ask({"kind": kind, "transfers": transfers, "per_s": PACE_PER_S})
    return {**answer, "cpu_dbos": answer["cpu_us"], "cpu_postgres": meter.per_command_us(transfers)["postgres"]}


def _pid_of_nats(stage: Stage) -> int:
    process = stage.engines.nats._process
    assert process is not None  # it runs as long as the stage is there
    return process.pid


async def _pairs(stage: Stage, kind: str, ours: int, theirs: int) -> AsyncGenerator[tuple[Answer, Answer], None]:
    """So many transfers by Foldline and so many by DBOS, again and again, in turns as to who is first."""
    system, caller = await _ours(stage)
    peer = await _peer(stage)
    try:
        nth = 0
        while True:
            first, second = await in_turn(
                nth,
                lambda: _foldline(stage, system, caller, kind, ours),
                lambda: _dbos(stage, system, peer, kind, theirs),
            )
            yield first, second
            nth += 1
    finally:
        await peer.stop()
        await caller.stop()


async def sustained(stage: Stage, scale: float) -> AsyncGenerator[Sample, None]:
    """Transfers a second; as many of each as take about as long as the other's."""
    async with aclosing(_pairs(stage, "sustained", int(900 * scale), int(150 * scale))) as pairs:
        async for ours, theirs in pairs:
            yield Sample(
                figure=ours["per_s"],
                ceiling=theirs["per_s"],
                cpu_us=_costs(ours),
                ceiling_cpu_us=_costs(theirs),
                notes={
                    "starts_per_s": ours["starts_per_s"],
                    **{name: value for name, value in ours.items() if name.startswith("mib_")},
                },
            )


async def paced(stage: Stage, scale: float) -> AsyncGenerator[Sample, None]:
    """The median time of a transfer when 50 a second are started."""
    transfers = int(200 * scale)
    async with aclosing(_pairs(stage, "paced", transfers, transfers)) as pairs:
        async for ours, theirs in pairs:
            yield Sample(
                figure=ours["p50_ms"],
                ceiling=theirs["p50_ms"],
                cpu_us=_costs(ours),
                ceiling_cpu_us=_costs(theirs),
                notes={
                    "p99_ms": ours["p99_ms"],
                    "p99_by_p50": ours["p99_ms"] / ours["p50_ms"],
                    "dbos_p99_ms": theirs["p99_ms"],
                    "dbos_p99_by_p50": theirs["p99_ms"] / theirs["p50_ms"],
                },
            )


ROWS = (
    Row(
        name="transfers_vs_dbos",
        title="transfers, start to completed, all processes",
        unit="/s",
        ceiling="DBOS, the same four steps",
        measure=sustained,
        floor=6.0,
        peer="DBOS 80/s, p50 12 ms alone",
    ),
    Row(
        name="transfers_at_50_vs_dbos",
        title="a transfer, start to completed, 50 started a second, p50",
        unit=" ms",
        ceiling="DBOS, the same four steps",
        measure=paced,
        less_is_better=True,
    ),
)

"""Transfers from start to completed, by all of Foldline's processes and by a peer: how many a second, and how long each takes.

DBOS and Restate run in an environment of their own, `.venv-bench`, that `make bench` makes; the other rows do without it.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psycopg

from deploy.bootstrap import with_database
from deploy.local.system import PROJECTOR, READ, RELAY, SAGA, WRITE, System
from shared.platform.identity import Role
from tests.bench import workload
from tests.bench.children import Answer, Child, Meter, memory_mib
from tests.bench.row import Row, Sample, in_turn
from tests.bench.rows import _costs
from tests.bench.stage import Stage

ROOT = Path(__file__).resolve().parents[2]
PEER_PYTHON = ROOT / ".venv-bench/bin/python"
RESTATE_SERVER = ".venv-bench/node_modules/@restatedev/restate-server-*/bin/restate-server"
PROGRAMS = (WRITE, RELAY, READ, PROJECTOR, SAGA)
PACE_PER_S = 50.0


async def _child(stage: Stage, *command: str) -> Child:
    """A process of the bench that is started otherwise than the others."""
    process = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    child = Child(process)
    stage._children.append(child)
    return child


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerKind:
    """A peer: the module that runs it, and numbers of callers of which the best is taken, found before anything counts."""

    name: str
    callers: tuple[int, ...]


# What was tried for DBOS is told in peer_dbos.py.
DBOS = PeerKind(name="dbos", callers=(8,))
RESTATE = PeerKind(name="restate", callers=(16, 32, 64, 128))


async def _peer(stage: Stage, kind: PeerKind) -> Child:
    """A peer, on a database of its own on the same server."""
    arguments = []
    if kind is RESTATE:
        arguments = [str(server) for server in ROOT.glob(RESTATE_SERVER)]
    if not PEER_PYTHON.exists() or (kind is RESTATE and not arguments):
        raise RuntimeError(f"{kind.name} is not in .venv-bench: `make peer` puts it there, or name the rows that do without")
    database = f"peer_{kind.name}_{len(stage._children)}"
    async with await psycopg.AsyncConnection.connect(stage.engines.admin_url, autocommit=True) as admin:
        await admin.execute(f"CREATE DATABASE {database}".encode())
    url = with_database(stage.engines.admin_url, database)
    return await _child(stage, str(PEER_PYTHON), "-m", f"tests.bench.peer_{kind.name}", url, str(stage.folder), *arguments)


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


async def _theirs(stage: Stage, system: System, peer: Child, name: str, **order: Any) -> Answer:
    meter = Meter(stage.pids(system))
    answer = await peer.ask({"per_s": PACE_PER_S, **order})
    return {**answer, f"cpu_{name}": answer["cpu_us"], "cpu_postgres": meter.per_command_us(order["transfers"])["postgres"]}


async def _best_callers(peer: Child, kind: PeerKind, transfers: int) -> int:
    """The number of callers with which a peer does most a second."""
    if len(kind.callers) == 1:
        return kind.callers[0]
    rates = {}
    for callers in kind.callers:
        answer = await peer.ask({"kind": "sustained", "transfers": transfers, "callers": callers})
        rates[callers] = answer["per_s"]
    return max(rates, key=lambda callers: rates[callers])


def _pid_of_nats(stage: Stage) -> int:
    process = stage.engines.nats._process
    assert process is not None  # it runs as long as the stage is there
    return process.pid


async def _pairs(
    stage: Stage, kind: PeerKind, how: str, ours: int, theirs: int
) -> AsyncGenerator[tuple[Answer, Answer, int], None]:
    """So many transfers by Foldline and so many by a peer, in turns as to who is first; and how many callers the peer had."""
    system, caller = await _ours(stage)
    peer = await _peer(stage, kind)
    try:
        callers = await _best_callers(peer, kind, theirs) if how == "sustained" else kind.callers[0]
        nth = 0
        while True:
            first, second = await in_turn(
                nth,
                lambda: _foldline(stage, system, caller, how, ours),
                lambda: _theirs(stage, system, peer, kind.name, kind=how, transfers=theirs, callers=callers),
            )
            yield first, second, callers
            nth += 1
    finally:
        await peer.stop()
        await caller.stop()


async def sustained(stage: Stage, scale: float, *, kind: PeerKind) -> AsyncGenerator[Sample, None]:
    """Transfers a second; as many of each as take about as long as the other's."""
    async with aclosing(_pairs(stage, kind, "sustained", int(900 * scale), int(150 * scale))) as pairs:
        async for ours, theirs, callers in pairs:
            yield Sample(
                figure=ours["per_s"],
                ceiling=theirs["per_s"],
                cpu_us=_costs(ours),
                ceiling_cpu_us=_costs(theirs),
                notes={
                    "starts_per_s": ours["starts_per_s"],
                    f"{kind.name}_callers": callers,
                    **{name: value for name, value in ours.items() if name.startswith("mib_")},
                },
            )


async def paced(stage: Stage, scale: float, *, kind: PeerKind) -> AsyncGenerator[Sample, None]:
    """The median time of a transfer when 50 a second are started."""
    transfers = int(200 * scale)
    async with aclosing(_pairs(stage, kind, "paced", transfers, transfers)) as pairs:
        async for ours, theirs, _ in pairs:
            yield Sample(
                figure=ours["p50_ms"],
                ceiling=theirs["p50_ms"],
                cpu_us=_costs(ours),
                ceiling_cpu_us=_costs(theirs),
                notes={
                    "p99_ms": ours["p99_ms"],
                    "p99_by_p50": ours["p99_ms"] / ours["p50_ms"],
                    f"{kind.name}_p99_ms": theirs["p99_ms"],
                    f"{kind.name}_p99_by_p50": theirs["p99_ms"] / theirs["p50_ms"],
                },
            )


ROWS = (
    Row(
        name="transfers_vs_dbos",
        title="transfers, start to completed, all processes",
        unit="/s",
        ceiling="DBOS, the same four steps",
        measure=partial(sustained, kind=DBOS),
        floor=9.0,
        peer="DBOS 80/s, p50 12 ms alone",
    ),
    Row(
        name="transfers_at_50_vs_dbos",
        title="a transfer, start to completed, 50 started a second, p50",
        unit=" ms",
        ceiling="DBOS, the same four steps",
        measure=partial(paced, kind=DBOS),
        floor=1.5,
        less_is_better=True,
    ),
    Row(
        name="transfers_vs_restate",
        title="transfers, start to completed, all processes",
        unit="/s",
        ceiling="Restate, the same four steps",
        measure=partial(sustained, kind=RESTATE),
    ),
    Row(
        name="transfers_at_50_vs_restate",
        title="a transfer, start to completed, 50 started a second, p50",
        unit=" ms",
        ceiling="Restate, the same four steps",
        measure=partial(paced, kind=RESTATE),
        less_is_better=True,
    ),
)

"""What is measured: each row a figure of Foldline and its ceiling, taken one right after the other, round after round.

The order of the two changes with every round, so that a machine that slows down or warms up favours neither.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any

import psycopg

from deploy.bootstrap import Database
from deploy.engines.child import tail
from deploy.local.system import PROJECTOR, READ, RELAY, WRITE, System
from tests.bench import echo, workload
from tests.bench.children import Answer, Child, Meter, memory_mib
from tests.bench.row import Measure, Row, Sample, in_turn
from tests.bench.stage import Stage, head

CATCH_UP_EVENTS = 60_000
PROJECTION_GROUPS = 4


async def _loaded(stage: Stage, system: System, kind: str, method: str, **details: float) -> Answer:
    """A load on the write service. Every command must have left its event, else the figure would be of refusals."""
    before = await head(system.databases.write)
    meter = Meter(stage.pids(system, WRITE))
    answer = await stage.order(system, kind, method=method, **details)
    cost = meter.per_command_us(answer["sent"])
    if (grown := await head(system.databases.write) - before) != answer["sent"]:
        raise RuntimeError(f"{answer['sent']} commands were sent and {grown} events appended")
    return {**answer, "cpu_load": answer["cpu_us"], **{f"cpu_{name}": value for name, value in cost.items()}}


async def _echoed(stage: Stage, kind: str, method: str, as_system: System | None = None, **details: Any) -> Answer:
    """The load on the echo; with the metadata that `as_system` would get, if it is given."""
    meter = Meter({"echo": stage.echo.pid})
    answer = await stage.order_echo(kind, method, token="" if as_system is None else stage.token(as_system), **details)
    return {**answer, "cpu_load": answer["cpu_us"], "cpu_echo": meter.per_command_us(answer["sent"])["echo"]}


def _costs(answer: Answer) -> dict[str, float]:
    return {
        name.removeprefix("cpu_"): round(us, 1) for name, us in answer.items() if name.startswith("cpu_") and name != "cpu_us"
    }


def unary(callers: int, accounts: int) -> Measure:
    """DepositMoney, one command a call; the ceiling is an echo of the same bytes."""

    async def measure(stage: Stage, scale: float) -> AsyncGenerator[Sample, None]:
        systems = await stage.write_services()
        load: dict[str, Any] = {"callers": callers, "accounts": accounts, "seconds": 2.0 * scale}
        for nth, system in enumerate(cycle(systems)):
            ours, bare = await in_turn(
                nth,
                partial(_loaded, stage, system, "unary", workload.DEPOSIT, **load),
                partial(_echoed, stage, "unary", echo.UNARY, **load),
            )
            notes = {"p50_ms": ours["p50_ms"], "p99_ms": ours["p99_ms"], "echo_p50_ms": bare["p50_ms"]}
            yield Sample(
                figure=ours["per_s"], ceiling=bare["per_s"], cpu_us=_costs(ours), ceiling_cpu_us=_costs(bare), notes=notes
            )

    return measure


async def lone_caller(stage: Stage, scale: float) -> AsyncGenerator[Sample, None]:
    """The median time of one caller's DepositMoney; the ceiling is that of an echo and of a bare commit, together.

    The ratio has two values on a virtual machine, about 1.6 and 2.4, from minute to minute: in the second all three processes
    that a command passes take twice their processor time, the echo a third more. It is not the build of Python (Debian's 3.11.2
    and one without optimizations have both) nor the flush (the bare commit takes the same). With all processes on one
    processor (`taskset -c 0`) a command takes the least processor time, so it is what moves between processors and caches.
    """
    systems = await stage.write_services()
    writer = await stage.child("bare_write", stage.engines.clone("write").owner)
    load: dict[str, Any] = {"callers": 1, "accounts": 1000, "seconds": 1.2 * scale}
    for nth, system in enumerate(cycle(systems)):
        ours, bare, commit = await in_turn(
            nth,
            partial(_loaded, stage, system, "unary", workload.DEPOSIT, **load),
            partial(_echoed, stage, "unary", echo.UNARY, **load),
            partial(writer.ask, {"kind": "commit", "seconds": 1.2 * scale, "batch": 1, "accounts": 1000}),
        )
        yield Sample(
            figure=ours["p50_ms"],
            ceiling=bare["p50_ms"] + commit["p50_ms"],
            cpu_us=_costs(ours),
            ceiling_cpu_us=_costs(bare),
            notes={"p99_ms": ours["p99_ms"], "echo_p50_ms": bare["p50_ms"], "commit_p50_ms": commit["p50_ms"]},
        )


async def batches(stage: Stage, scale: float) -> AsyncGenerator[Sample, None]:
    """SendBatch of a hundred by four callers; the ceiling is a bare statement that writes the same rows.

    The service appends through one connection, so the bare loop has one as well.
    """
    systems = await stage.write_services()
    writer = await stage.child("bare_write", stage.engines.clone("write").owner)
    load: dict[str, Any] = {"callers": 4, "accounts": 1000, "batch": 100, "seconds": 1.5 * scale}
    for nth, system in enumerate(cycle(systems)):
        ours, bare = await in_turn(
            nth,
            partial(_loaded, stage, system, "batch", workload.SEND_BATCH, **load),
            partial(_bare_append, stage, system, writer, seconds=1.5 * scale),
        )
        yield Sample(
            figure=ours["per_s"],
            ceiling=bare["per_s"],
            cpu_us=_costs(ours),
            ceiling_cpu_us=_costs(bare),
            notes={"batch_p50_ms": ours["p50_ms"], "bare_p50_ms": bare["p50_ms"]},
        )


async def _bare_append(stage: Stage, system: System, writer: Child, seconds: float) -> Answer:
    meter = Meter(stage.pids(system))
    answer = await writer.ask({"kind": "append", "seconds": seconds, "batch": 100, "accounts": 1000})
    return {**answer, "cpu_writer": answer["cpu_us"], "cpu_postgres": meter.per_command_us(answer["sent"])["postgres"]}


async def streams(stage: Stage, scale: float) -> AsyncGenerator[Sample, None]:
    """The write service's processor time for a command of SendStream; the ceiling is an echo's, with the same metadata.

    Eight streams with eight commands under way on each. A rate would say less: the write service and the load generator share the
    processors, and what bounds the rate is the sum of both (and PostgreSQL's).
    """
    systems = await stage.write_services()
    load: dict[str, Any] = {"callers": 8, "window": 8, "accounts": 1000, "seconds": 1.5 * scale}
    for nth, system in enumerate(cycle(systems)):
        ours, bare = await in_turn(
            nth,
            partial(_loaded, stage, system, "stream", workload.SEND_STREAM, **load),
            partial(_echoed, stage, "stream", echo.STREAM, as_system=system, **load),
        )
        yield Sample(
            figure=ours["cpu_write_service"],
            ceiling=bare["cpu_echo"],
            cpu_us=_costs(ours),
            ceiling_cpu_us=_costs(bare),
            notes={"per_s": ours["per_s"], "echo_per_s": bare["per_s"]},
        )


def gathering(callers: int) -> Measure:
    """DepositMoney with the committer's wait; the other side is the same service told never to wait."""

    async def measure(stage: Stage, scale: float) -> AsyncGenerator[Sample, None]:
        waits, hurries = await stage.write_services(), await stage.write_services(gather_wait_s_max="0")
        load: dict[str, Any] = {"callers": callers, "accounts": 1000, "seconds": 0.7 * scale}
        for nth, (waiting, hurrying) in enumerate(cycle(zip(waits, hurries, strict=True))):
            with_wait, without = await in_turn(
                nth,
                partial(_loaded, stage, waiting, "unary", workload.DEPOSIT, **load),
                partial(_loaded, stage, hurrying, "unary", workload.DEPOSIT, **load),
            )
            yield Sample(
                figure=with_wait["per_s"],
                ceiling=without["per_s"],
                cpu_us=_costs(with_wait),
                ceiling_cpu_us=_costs(without),
                notes={"p50_ms": with_wait["p50_ms"], "without_p50_ms": without["p50_ms"]},
            )

    return measure


async def catching_up(stage: Stage, scale: float) -> AsyncGenerator[Sample, None]:
    """The projector from position 0 to the head through ReadAll; the ceiling is a bare loop over the same tables.

    The relay does not run, so there is no stream: all of it comes from the store. Each round has a fresh read database.
    """
    system = await stage.system(WRITE)
    await stage.order(system, "set_up", accounts=1000, batch=250)
    while await head(system.databases.write) < CATCH_UP_EVENTS * scale:
        await stage.order(system, "batch", method=workload.SEND_BATCH, callers=4, batch=250, seconds=0.3, warm_s=0.0)
    end, nth = await head(system.databases.write), 0
    while True:
        ours, bare = await in_turn(nth, lambda: _projected(stage, system, end), lambda: bare_catch_up(stage, system))
        if bare["done"] != end:
            raise RuntimeError(f"the bare loop ended at {bare['done']}, the line at {end}")
        yield Sample(
            figure=ours["per_s"],
            ceiling=bare["per_s"],
            cpu_us=_costs(ours),
            ceiling_cpu_us=_costs(bare),
            notes={"events": end},
        )
        nth += 1


async def _projected(stage: Stage, system: System, end: int) -> Answer:
    """Lets a projector of its own catch up. The clock runs from its first checkpoint on: not while it starts."""
    database = stage.engines.clone("read")
    like = system.programs[PROJECTOR]
    name = f"projector-{database.name}"
    system.add(replace(like, name=name, settings={**like.settings, "FOLDLINE_DATABASE_URL": database.app}))
    try:
        system.start(name)
        async with await psycopg.AsyncConnection.connect(database.admin, autocommit=True) as watch:
            try:
                first = await _until(watch, 1)
                began, meter = time.perf_counter(), Meter(stage.pids(system, name, WRITE))
                await _until(watch, end)
            except RuntimeError as error:
                raise RuntimeError(f"{error}; its log ends with:\n{tail(system.log(name))}") from error
            took_s = time.perf_counter() - began
        cost = meter.per_command_us(end - first)
        cost["projector"] = cost.pop(name)
        return {"per_s": (end - first) / took_s, **{f"cpu_{process}": us for process, us in cost.items()}}
    finally:
        await system.stop(name)
        stage.engines.drop(database)


async def _until(watch: psycopg.AsyncConnection, position: int) -> int:
    """Waits until the projector's checkpoint is there; returns where it is."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        cursor = await watch.execute("SELECT min(position), count(*) FROM checkpoints WHERE serves")
        row = await cursor.fetchone()
        if row is not None and row[1] == PROJECTION_GROUPS and row[0] >= position:
            return int(row[0])
        await asyncio.sleep(0.005)
    raise RuntimeError(f"the projector did not reach position {position} within 60 s")


async def bare_catch_up(stage: Stage, system: System) -> Answer:
    """The line of a system by a bare loop, into a read database of its own."""
    database: Database = stage.engines.clone("read")
    try:
        meter = Meter(stage.pids(system))
        child = await stage.child("bare_catch_up", system.databases.write.owner, database.app)
        answer = await child.answer()
        await child.stop()
        cost = meter.per_command_us(answer["done"])["postgres"]
        return {**answer, "cpu_loop": answer["cpu_us"], "cpu_postgres": cost}
    finally:
        stage.engines.drop(database)


async def whole_system(stage: Stage, scale: float) -> AsyncGenerator[Sample, None]:
    """DepositMoney by 64 callers while relay, projector and read service work beside it; the ceiling is the echo."""
    programs = (WRITE, RELAY, READ, PROJECTOR)
    system = await stage.system(*programs)
    await stage.order(system, "set_up", accounts=1000, batch=250)
    await asyncio.sleep(1)
    idle = {f"idle_mib_{name}": round(memory_mib(system.pid(name)), 1) for name in programs}
    load: dict[str, Any] = {"callers": 64, "accounts": 1000, "seconds": 2.0 * scale}
    nth = 0
    while True:
        ours, bare = await in_turn(
            nth,
            lambda: _with_consumers(stage, system, programs, load),
            lambda: _echoed(stage, "unary", echo.UNARY, **load),
        )
        notes = {name: value for name, value in ours.items() if name.startswith("mib_") or name == "lag_s"}
        yield Sample(
            figure=ours["per_s"],
            ceiling=bare["per_s"],
            cpu_us=_costs(ours),
            ceiling_cpu_us=_costs(bare),
            notes={**idle, **notes},
        )
        nth += 1


async def _with_consumers(stage: Stage, system: System, programs: tuple[str, ...], load: Mapping[str, float]) -> Answer:
    """The load, and how long after it the tables were behind; the cost is of both together."""
    meter = Meter(stage.pids(system, *programs))
    answer = await stage.order(system, "unary", method=workload.DEPOSIT, **load)
    memory = {f"mib_{name}": round(memory_mib(system.pid(name)), 1) for name in programs}
    began, end = time.perf_counter(), await head(system.databases.write)
    async with await psycopg.AsyncConnection.connect(system.databases.read.admin, autocommit=True) as watch:
        await _until(watch, end)
    lag_s = round(time.perf_counter() - began, 3)
    cost = {f"cpu_{name}": us for name, us in meter.per_command_us(answer["sent"]).items()}
    return {**answer, **memory, **cost, "cpu_load": answer["cpu_us"], "lag_s": lag_s}


GATED = (
    "unary_64_vs_echo",
    "unary_1_p50_vs_echo_plus_commit",
    "send_batch_100_vs_append",
    "catch_up_vs_raw",
    "get_vs_echo",
    "list_50_vs_select",
    "rebuild_vs_raw",
    "transfers_vs_dbos",
    "telemetry_off_vs_on",
)
"""The rows whose ratios are in the report's `ratios`."""

ROWS: tuple[Row, ...] = (
    Row(
        name="unary_64_vs_echo",
        title="DepositMoney, 64 callers, 1,000 accounts",
        unit="/s",
        ceiling="bare grpc.aio echo",
        measure=unary(64, 1000),
        floor=0.55,
        peer="prototypes 0.58-0.98; in process: eventsourcing 1,247/s, Emmett 1,849/s",
    ),
    Row(
        name="unary_64_hot_account",
        title="DepositMoney, 64 callers, one account",
        unit="/s",
        ceiling="bare grpc.aio echo",
        measure=unary(64, 1),
    ),
    Row(
        name="unary_1_p50_vs_echo_plus_commit",
        title="DepositMoney, 1 caller, p50",
        unit=" ms",
        ceiling="echo + bare commit",
        measure=lone_caller,
        floor=1.7,
        less_is_better=True,
        peer="prototypes 1.3-1.7",
    ),
    Row(
        name="send_batch_100_vs_append",
        title="SendBatch of 100, 4 callers, commands",
        unit="/s",
        ceiling="bare INSERT of the same rows",
        measure=batches,
        floor=0.50,
        peer="UmaDB (Rust) 60,000 events/s, without a command log",
    ),
    Row(
        name="stream_8x8_vs_echo",
        title="SendStream, 8 streams x 8, the server's processor time",
        unit=" µs",
        ceiling="bare stream echo",
        measure=streams,
        floor=3.0,
        less_is_better=True,
    ),
    Row(
        name="catch_up_vs_raw",
        title=f"projector, {CATCH_UP_EVENTS:,} events through ReadAll",
        unit="/s",
        ceiling="bare read-fold-upsert",
        measure=catching_up,
        floor=0.40,
        peer="eventsourcing 1,570/s; Emmett 4,222/s",
    ),
    Row(
        name="whole_system",
        title="DepositMoney, 64 callers, all processes beside it",
        unit="/s",
        ceiling="bare grpc.aio echo",
        measure=whole_system,
    ),
    *(
        Row(
            name=f"gathering_{callers}",
            title=f"DepositMoney, {callers} callers, with the wait",
            unit="/s",
            ceiling="without the wait",
            measure=gathering(callers),
        )
        for callers in (1, 2, 4, 8, 16, 32, 64, 128)
    ),
)

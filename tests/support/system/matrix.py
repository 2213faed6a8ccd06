"""Processes of the bank that take each of their paths, and whether each step was taken once, whatever happened meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

import grpc.aio
import psycopg
from pydantic import SecretStr

from deploy.bootstrap import Database
from deploy.local.system import SAGA
from foldline.v1 import command_pb2
from saga_service.app import SagaSettings
from shared.platform import postgres
from shared.platform.identity import Role
from shared.platform.leader import LockClass
from tests.support.clients.bank import (
    INSIDER,
    Bank,
    deposit,
    freeze,
    item,
    new_id,
    open_account,
    register,
    start_registration,
    start_transfer,
)
from tests.support.system.engines import Engines
from tests.support.system.halting import Halt
from tests.support.system.stack import Stack
from tests.support.system.waiting import eventually


@dataclass(frozen=True, slots=True)
class Path:
    """A way that a process may take: its steps, and those that are refused without being sent."""

    type: str
    steps: tuple[str, ...]
    refused: tuple[str, ...] = ()


COMPLETED = Path("transfer", ("debit", "credit", "complete"))
REFUNDED = Path("transfer", ("debit", "credit", "refund", "fail"))
SUSPENDED = Path("transfer", ("debit", "credit", "refund", "suspend", "fail"), refused=("credit", "refund"))
SUCCEEDED = Path("registration", ("reserve", "hold", "confirm"))
RELEASED = Path("registration", ("reserve", "hold", "confirm", "release", "fail"), refused=("confirm",))

PATHS = {"completed": COMPLETED, "refunded": REFUNDED, "suspended": SUSPENDED, "succeeded": SUCCEEDED, "released": RELEASED}

# Every step is met on one path, with all that leads to it. A step that is refused without being sent has no places.
STEPS: dict[str, tuple[str, ...]] = {
    "completed": ("debit", "credit", "complete"),
    "refunded": ("refund", "fail"),
    "suspended": ("suspend",),
    "succeeded": ("reserve", "hold", "confirm"),
    "released": ("release", "fail"),
}

# What each path leaves in the line of events behind the event that begins it, once each and in this order.
LEAVES = {
    "completed": ["MoneyWithdrawn", "MoneyDeposited", "TransferCompleted"],
    "refunded": ["MoneyWithdrawn", "MoneyDeposited", "TransferFailed"],
    "suspended": ["MoneyWithdrawn", "MoneySuspended", "TransferFailed"],
    "succeeded": ["LoginReserved", "LoginConfirmed", "UserRegistrationSucceeded"],
    "released": ["LoginReserved", "LoginConfirmed", "LoginReleased", "UserRegistrationFailed"],
}

LED_BY = """
SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND classid = %s AND granted
AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""
TABLES = ("checkpoints", "processes", "process_history", "process_commands", "process_timers", "process_inputs", "deliveries")


@dataclass(frozen=True, slots=True)
class Begun:
    """A process, and the correlation id of all that it does; `step` is its own one, if it has one."""

    id: str
    path: str
    correlation_id: str
    step: str = ""

    @property
    def before(self) -> str:
        """The step before its own; empty if that is the first."""
        steps = PATHS[self.path].steps
        return ("", *steps)[steps.index(self.step)]


@dataclass(slots=True)
class World:
    """A saga database, and processes that only the services on it run: one for each step."""

    database: Database
    settings: Mapping[str, Any]
    report: File
    processes: Sequence[Begun] = ()
    _connection: postgres.Connection | None = None

    def halt(self, place: str = "", *, aligned: bool = False, **more: Any) -> Halt:
        """Where a service halts; `aligned` if it brings each process to its step itself, all at the same time."""
        return Halt(
            place=place,
            steps={process.id: process.step for process in self.processes if process.step},
            before={process.id: process.before for process in self.processes} if aligned else {},
            refused=frozenset((process.id, step) for process in self.processes for step in PATHS[process.path].refused),
            only=frozenset(process.id for process in self.processes),
            report=self.report,
            **more,
        )

    def met(self) -> set[tuple[str, str]]:
        """The paths and steps of which a service has halted at a place."""
        ids = set(self.report.read_text().split()) if self.report.exists() else set()
        return {(process.path, process.step) for process in self.processes if process.id in ids}

    async def led_by(self) -> int | None:
        """The server's process that holds the lease of who leads."""
        rows = await self.rows(LED_BY, int(LockClass.SAGA))
        return rows[0][0] if rows else None

    async def is_led_by_another_than(self, former: int | None) -> bool:
        """Whether another session than the former one holds the lease."""
        return await self.led_by() not in (None, former)

    async def is_stood_by(self) -> bool:
        """Whether a service leads and another stands by."""
        rows = await self.rows(
            "SELECT FROM pg_stat_activity WHERE application_name = 'foldline-lease' AND datname = current_database()"
        )
        return len(rows) > 1

    async def ended(self, position: int, deadline_s: float = 120) -> None:
        """Waits until all processes have ended, nothing of any is left to do, and the line is followed up to a position."""
        query = """SELECT (SELECT count(*) FROM processes WHERE status = 'ended' AND trouble = ''),
                          (SELECT count(*) FROM processes WHERE status <> 'ended' OR trouble <> ''),
                          (SELECT count(*) FROM process_commands), (SELECT count(*) FROM process_timers),
                          (SELECT coalesce(max(position), 0) FROM checkpoints WHERE name = 'processes')"""

        async def over() -> bool:
            (row,) = await self.rows(query)
            assert row[:4] == (len(self.processes), 0, 0, 0), row
            return bool(row[4] >= position)

        await eventually(over, deadline_s, every_s=0.05)

    async def left(self) -> list[Any]:
        """The commands that have no answer: path, step, tries, and in how many seconds each is due."""
        paths = {process.id: process.path for process in self.processes}
        query = "SELECT process_id, step, tries, extract(epoch FROM due_at - clock_timestamp())::int FROM process_commands"
        return [(paths.get(id_, id_), *more) for id_, *more in await self.rows(query)]

    async def all_rows(self) -> dict[str, list[Any]]:
        """All that the tables hold."""
        return {table: sorted(await self.rows(f"SELECT {table}::text FROM {table}")) for table in TABLES}

    async def sever(self) -> None:
        """The server ends all connections of the services, those of the lease too."""
        await self.rows(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND starts_with(application_name, 'foldline-')"
        )

    async def rows(self, query: Any, *values: Any) -> list[Any]:
        """What the database answers to an administrator, after a restart as soon as it does."""
        while True:
            try:
                if self._connection is None:
                    self._connection = await postgres.connect(self.database.admin, application_name="matrix")
                return await (await self._connection.execute(query, values)).fetchall()
            except psycopg.OperationalError:
                await self.close()
                await asyncio.sleep(0.1)

    async def close(self) -> None:
        """Ends its connection."""
        if self._connection is not None:
            await self._connection.close()
        self._connection = None


class Matrix:
    """Makes worlds on a system without a saga service, begins processes, and sees what became of them."""

    def __init__(self, stack: Stack, engines: Engines, write: grpc.aio.Channel, folder: File) -> None:
        self._stack = stack
        self._engines = engines
        self._folder = folder
        self._bank = Bank(write, write, stack.token("acme", "alice", INSIDER))
        self._auditor = Bank(write, write, stack.token("operators", "olga", [Role.READER]))
        self._accounts: tuple[str, str, str] | None = None
        given: dict[str, Any] = dict(self._stack.programs[SAGA].settings)
        settings = SagaSettings(**{name.removeprefix("FOLDLINE_").lower(): value for name, value in given.items()})
        self._settings = {name: getattr(settings, name) for name in SagaSettings.model_fields}
        # The position from which on the line is read.
        self._from = 1

    async def worlds(self, count: int, *, begin: bool = True) -> list[World]:
        """Fresh databases whose services follow the line from its head on; in each, a process is begun for each step.

        Those whose own step is their first are begun last: an aligned service keeps back all that is behind them.
        """
        await self._open()
        last = (await self._auditor.line(self._from))[-1]
        self._from = last.position
        worlds = [await self._world(last.position, last.event_id) for _ in range(count)]
        if begin:
            await asyncio.gather(*map(self._fill, worlds))
        return worlds

    async def _world(self, position: int, event_id: str) -> World:
        database = await asyncio.to_thread(self._engines.clone, "saga")
        settings = {**self._settings, "database_url": SecretStr(database.app)}
        world = World(database, settings, self._folder / f"{database.name}.met")
        follows = "INSERT INTO checkpoints (name, shard, position, event_id) VALUES ('processes', %s, %s, %s) RETURNING 1"
        await world.rows(follows, self._settings["shard"], position, event_id)
        return world

    async def _fill(self, world: World) -> None:
        wanted = [(path, step) for path, steps in STEPS.items() for step in steps]
        first = [it for it in wanted if it[1] == PATHS[it[0]].steps[0]]
        world.processes = await self.begin(it for it in wanted if it not in first)
        world.processes = [*world.processes, *await self.begin(first)]

    async def begin(self, wanted: Iterable[tuple[str, str]]) -> list[Begun]:
        """Begins a process for each path, with a step as its own."""
        begun = [Begun(new_id(), path, new_id(), step) for path, step in wanted]
        transfers = [self._transfer(process) for process in begun if PATHS[process.path].type == "transfer"]
        registrations = [process for process in begun if PATHS[process.path].type == "registration"]
        await asyncio.gather(self._accepted(*transfers), *map(self._register, registrations))
        return begun

    def _transfer(self, process: Begun) -> command_pb2.BatchItem:
        assert self._accounts is not None
        blue, red, ice = self._accounts
        target = ice if process.path == "refunded" else red
        return item(start_transfer(process.id, blue, target, 1, command_id=process.correlation_id))

    async def _register(self, process: Begun) -> None:
        login, password = f"user-{process.id}", "correct horse battery"
        command = start_registration(process.id, login, password, command_id=process.correlation_id)
        await self._bank.call(self._bank.users.StartUserRegistration, command)

    async def _open(self) -> None:
        """Blue has money, red takes it, and ice is frozen."""
        if self._accounts is None:
            owner, blue, red, ice = (new_id() for _ in range(4))
            await self._accepted(item(register(owner, "Bill")))
            await self._accepted(*(item(open_account(account, owner)) for account in (blue, red, ice)))
            await self._accepted(item(deposit(blue, 1_000_000)), item(freeze(ice)))
            self._accounts = blue, red, ice

    async def _accepted(self, *items: command_pb2.BatchItem) -> None:
        if not items:
            return
        receipts = await self._bank.batch(*items)
        assert {receipt.status for receipt in receipts} == {command_pb2.COMMAND_STATUS_COMPLETED}, receipts

    async def restart_database(self) -> None:
        """PostgreSQL is killed with -9 and starts again."""
        await asyncio.to_thread(self._engines.postgres.kill)
        await asyncio.to_thread(self._engines.postgres.start)

    async def answers(self) -> bool:
        """Whether the write service answers; it is UNAVAILABLE while its database is."""
        try:
            await self.head()
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            return False
        return True

    async def head(self) -> int:
        """The line's last position."""
        return (await self._auditor.line(self._from))[-1].position

    async def ended(self, *worlds: World, deadline_s: float = 120) -> None:
        """Waits until all processes of the worlds have ended, and holds them to what their paths leave."""
        head = await self.head()
        await asyncio.gather(*(world.ended(head, deadline_s) for world in worlds))

    async def hold_to_paths(self, worlds: Iterable[World]) -> None:
        """Each step of each process has left its event once."""
        processes = [process for world in worlds for process in world.processes]
        found: dict[str, list[str]] = {process.correlation_id: [] for process in processes}
        for event in await self._auditor.line(self._from):
            if event.metadata.correlation_id in found:
                found[event.metadata.correlation_id].append(event.type.rpartition(".")[2])
        left = {process.id: found[process.correlation_id][1:] for process in processes}
        assert left == {process.id: LEAVES[process.path] for process in processes}

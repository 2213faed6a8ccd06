"""Processes of the bank that take each of their paths, and whether each step was taken once, whoever died meanwhile."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import grpc.aio

from deploy.local.system import SAGA
from shared.platform import postgres
from shared.platform.identity import Role
from shared.platform.leader import LockClass
from tests.support.clients.bank import INSIDER, Bank, new_id
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

# What each path leaves in the line of events behind the event that begins it, once each and in this order.
LEAVES = {
    "completed": ["MoneyWithdrawn", "MoneyDeposited", "TransferCompleted"],
    "refunded": ["MoneyWithdrawn", "MoneyDeposited", "TransferFailed"],
    "suspended": ["MoneyWithdrawn", "MoneySuspended", "TransferFailed"],
    "succeeded": ["LoginReserved", "LoginConfirmed", "UserRegistrationSucceeded"],
    "released": ["LoginReserved", "LoginConfirmed", "LoginReleased", "UserRegistrationFailed"],
}


class Matrix:
    """Begins processes on a system without a saga service, and sees what became of them."""

    def __init__(self, stack: Stack, write: grpc.aio.Channel) -> None:
        self._stack = stack
        self._bank = Bank(write, write, stack.token("acme", "alice", INSIDER))
        self._auditor = Bank(write, write, stack.token("operators", "olga", [Role.READER]))
        self._position = 0
        self._accounts: tuple[str, str, str] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """The settings of the saga service."""
        return {**self._stack.programs[SAGA].settings, "FOLDLINE_LOG_LEVEL": "error"}

    @property
    def admin_url(self) -> str:
        """An administrator's URL of the saga database."""
        return self._stack.databases.saga.admin

    async def is_led(self) -> bool:
        """Whether a saga service leads."""
        query = """SELECT FROM pg_locks WHERE locktype = 'advisory' AND classid = %s AND granted
                   AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"""
        async with await postgres.connect(self.admin_url, application_name="matrix") as connection:
            cursor = await connection.execute(query, (int(LockClass.SAGA),))
            return await cursor.fetchone() is not None

    async def begin(self, path: str) -> str:
        """Begins a process that will take this path; returns the correlation id of all that it does."""
        if PATHS[path].type == "registration":
            _, receipt = await self._bank.register_user(f"user-{new_id()}", "correct horse battery")
        else:
            blue, red, ice = await self._places()
            _, receipt = await self._bank.transfer(blue, ice if path == "refunded" else red, 1)
        self._position = self._position or receipt.position
        return receipt.command_id

    async def _places(self) -> tuple[str, str, str]:
        """Blue has money, red takes it, and ice is frozen."""
        if self._accounts is None:
            owner, _ = await self._bank.register("Bill")
            blue, red, ice = [(await self._bank.open(owner))[0] for _ in range(3)]
            await self._bank.deposit(blue, 1_000_000)
            await self._bank.freeze(ice)
            self._accounts = blue, red, ice
        return self._accounts

    async def all_ended(self, deadline_s: float = 30) -> None:
        """Waits until every process of the saga database has ended, and nothing of any is left to do."""
        query = """SELECT (SELECT count(*) FROM processes WHERE status <> 'ended' OR trouble <> ''),
                          (SELECT count(*) FROM process_commands), (SELECT count(*) FROM process_timers),
                          (SELECT coalesce(max(position), 0) FROM checkpoints WHERE name = 'processes')"""
        head = (await self._auditor.line(1))[-1].position
        async with await postgres.connect(self._stack.databases.saga.app, application_name="matrix") as connection:

            async def over() -> bool:
                cursor = await connection.execute(query)
                row = await cursor.fetchone()
                assert row is not None
                assert row[:3] == (0, 0, 0), row
                return bool(row[3] >= head)

            await eventually(over, deadline_s)

    async def left(self, correlation_ids: Collection[str]) -> dict[str, list[str]]:
        """The types of the events of each process, in the line's order, behind the one that began it."""
        found: dict[str, list[str]] = {id_: [] for id_ in correlation_ids}
        for event in await self._auditor.line(self._position):
            if event.metadata.correlation_id in found:
                found[event.metadata.correlation_id].append(event.type.rpartition(".")[2])
        return {id_: types[1:] for id_, types in found.items()}

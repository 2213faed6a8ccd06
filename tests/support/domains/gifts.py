"""A small process over the bank's commands, a write service whose answers a test chooses, and runners on a real database.

Every opened account gets a gift and then a bonus. After a refused gift it gets an apology.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from operator import attrgetter
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message
from grpc.aio import AioRpcError, Metadata

from bank.v1 import account_pb2
from deploy.bootstrap import Database
from foldline.v1 import command_pb2
from foldline.v1.event_store_pb2 import EventEnvelope
from shared.folds.delivery import Announcements
from shared.folds.errors import InternalError, Refusal, Rejected, Unavailable
from shared.folds.process import Answer, ProcessDefinition, Send, Step, Timer
from shared.folds.upcasting import NONE, Upcasters
from shared.line.follower import Feed, Follower
from shared.platform import postgres
from shared.platform.postgres import Reads
from shared.processes.admin import ProcessAdmin
from shared.processes.dispatcher import Dispatcher, RetryPolicy
from shared.processes.history_archive import HistoryArchive
from shared.processes.records import ProcessKey
from shared.processes.round import NO_ANNOUNCEMENTS
from shared.processes.runner import ProcessRunner
from shared.processes.steering import Steering
from shared.rpc.status import DETAILS_KEY, to_status
from tests.support.checks.history import connected
from tests.support.fakes.line import Store, StoreLine, uid
from tests.support.system.working import running

TENANT = "acme"
OWNER = uid(7)
LATE_AFTER = timedelta(hours=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gift:
    """Where it is."""

    phase: str = ""
    account_id: str = ""
    renames: tuple[str, ...] = ()


@dataclass(slots=True)
class Defects:
    """The defects of the folds, which a test may set."""

    accounts: set[str] = field(default_factory=set)


DEFECTS = Defects()


def deposit(account_id: str, amount: int) -> account_pb2.DepositMoneyRequest:
    """A deposit of the process."""
    return account_pb2.DepositMoneyRequest(account_id=account_id, amount_minor=amount, currency="USD")


def react(state: Gift, event: Message, envelope: EventEnvelope) -> Step[Gift] | None:
    """Sends the gift for an opened account; notes that an account is frozen."""
    match event:
        case account_pb2.AccountOpened():
            if event.account_id in DEFECTS.accounts:
                raise ValueError(f"the secret of {event.name}")
            due_at = envelope.recorded_at.ToDatetime(UTC) + LATE_AFTER
            return Step(
                state=replace(state, phase="giving", account_id=event.account_id),
                send=(Send(step="gift", command=deposit(event.account_id, 500)),),
                timers=(Timer(name="late", due_at=due_at),),
            )
        case account_pb2.AccountFrozen():
            return Step(state=replace(state, renames=(*state.renames, envelope.event_id)))
        case _:
            return None


def on_answer(state: Gift, answer: Answer) -> Step[Gift]:
    """After the gift the bonus, after that the end; an apology for what was refused."""
    match answer.step, answer.accepted:
        case "gift", True:
            return Step(
                state=replace(state, phase="topping up"), send=(Send(step="bonus", command=deposit(state.account_id, 100)),)
            )
        case "gift", False:
            return Step(
                state=replace(state, phase=f"sorry: {answer.reason}"),
                send=(Send(step="apology", command=deposit(state.account_id, 1)),),
                attention="GIFT_REFUSED",
                cancel_timers=("late",),
            )
        case "apology", _:
            return Step(state=replace(state, phase="sorry"), attention="GIFT_REFUSED", ended=True)
        case _:
            return Step(state=replace(state, phase="given"), ended=True)


def on_timer(state: Gift, name: str) -> Step[Gift] | None:
    """Late."""
    return Step(state=replace(state, phase=f"{state.phase}, {name}"), attention="LATE")


GIFT = ProcessDefinition(
    type="gift",
    aggregate="account",
    initial=Gift(),
    key={
        account_pb2.AccountOpened: attrgetter("account_id"),
        account_pb2.AccountFrozen: attrgetter("account_id"),
        account_pb2.MoneyDeposited: attrgetter("account_id"),
    },
    react=react,
    on_answer=on_answer,
    on_timer=on_timer,
    phase=attrgetter("phase"),
    skippable=frozenset({"bonus"}),
)


# The write service's double


class CallFailed(AioRpcError):
    """A call of gRPC that failed as a whole."""

    def __init__(self, refusal: Refusal) -> None:
        status = to_status(refusal)
        code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
        super().__init__(code, Metadata(), Metadata((DETAILS_KEY, status.SerializeToString())), status.message)


@dataclass(slots=True)
class WriteService:
    """Carries commands out, each id once, and answers a repeat with the first answer, as the real one does.

    `decide` may refuse a command: `InternalError` is a receipt that says FAILED and is not kept. `before` and `after` are
    awaited around the carrying out, and may fail the call or never return.
    """

    decide: Callable[[account_pb2.DepositMoneyRequest], Refusal | None] = lambda command: None
    before: Callable[[command_pb2.SendBatchRequest], Any] = lambda request: None
    after: Callable[[command_pb2.SendBatchRequest], Any] = lambda request: None
    calls: list[command_pb2.SendBatchRequest] = field(default_factory=list)
    carried_out: Counter[tuple[str, int]] = field(default_factory=Counter)
    items: dict[str, command_pb2.BatchItem] = field(default_factory=dict)
    receipts: dict[str, command_pb2.CommandReceipt] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)

    async def send_batch(self, request: command_pb2.SendBatchRequest, *, timeout: float, metadata: Any) -> Any:  # noqa: ASYNC109 (the stub's)
        """`CommandServiceStub.SendBatch`."""
        self.calls.append(request)
        self.tokens.add(dict(metadata)["authorization"])
        await asyncio.sleep(0)
        await _maybe(self.before(request))
        receipts = [self._carry_out(item) for item in request.items]
        await _maybe(self.after(request))
        return command_pb2.SendBatchResponse(receipts=receipts)

    def _carry_out(self, item: command_pb2.BatchItem) -> command_pb2.CommandReceipt:
        command = account_pb2.DepositMoneyRequest.FromString(item.command.value)
        id_ = command.options.command_id if item.tenant == TENANT else f"{item.tenant} {command.options.command_id}"
        if id_ in self.receipts:
            assert self.items[id_] == item, "the same id with another content"
            return self.receipts[id_]
        refusal = self.decide(command)
        receipt = command_pb2.CommandReceipt(command_id=command.options.command_id, status=command_pb2.COMMAND_STATUS_COMPLETED)
        if isinstance(refusal, InternalError):
            receipt.status = command_pb2.COMMAND_STATUS_FAILED
        elif refusal is not None:
            receipt.status = command_pb2.COMMAND_STATUS_REJECTED
        if refusal is not None:
            receipt.error.CopyFrom(to_status(refusal))
        if not isinstance(refusal, InternalError | Unavailable):
            self.items[id_], self.receipts[id_] = item, receipt
        if refusal is None:
            self.carried_out[command.account_id, command.amount_minor] += 1
        return receipt


async def _maybe(result: Any) -> None:
    if result is not None:
        await result


def frozen(command: account_pb2.DepositMoneyRequest) -> Refusal | None:
    """Refuses gifts."""
    return Rejected("ACCOUNT_FROZEN", "the account is frozen") if command.amount_minor == 500 else None


# Runners on a database


@dataclass(slots=True)
class Clock:
    """The time, which a test may move."""

    ahead: timedelta = timedelta()

    def __call__(self) -> datetime:
        return datetime(2026, 1, 2, 3, 4, 10, tzinfo=UTC) + self.ahead + (datetime.now(UTC) - BEGAN)


BEGAN = datetime.now(UTC)


@dataclass(slots=True)
class World:
    """A line, a write service and a saga database; any number of runners on them."""

    database: Database
    token_file: Path
    store: Store = field(default_factory=Store)
    write: WriteService = field(default_factory=WriteService)
    clock: Clock = field(default_factory=Clock)
    patience: RetryPolicy = field(default_factory=lambda: RetryPolicy(first_s=0.01, longest_s=0.05, failures_max=3))

    def open(self, *numbers: int, name: str = "blue") -> None:
        """Opens accounts, each with one event."""
        for number in numbers:
            event = account_pb2.AccountOpened(account_id=uid(number), owner_id=OWNER, currency="USD", name=name)
            envelope = self.store.append(TENANT, uid(number), event)
            envelope.metadata.user_id = "alice"
            envelope.metadata.correlation_id = uid(number + 1_000_000)
            envelope.metadata.traceparent = f"00-{number:032x}-{number:016x}-01"

    def freeze(self, number: int) -> EventEnvelope:
        """Freezes an account."""
        return self.store.append(TENANT, uid(number), account_pb2.AccountFrozen(account_id=uid(number), owner_id=OWNER))

    def runner(
        self,
        *,
        feed: Feed | None = None,
        dispatcher: Callable[..., Dispatcher] = Dispatcher,
        write: WriteService | None = None,
        manager: ProcessDefinition[Any] = GIFT,
        batch_max: int = 500,
        announcements: Announcements = NO_ANNOUNCEMENTS,
        upcasters: Upcasters = NONE,
        archive: HistoryArchive | None = None,
    ) -> ProcessRunner:
        """A runner that follows the line and is not running yet."""
        follower = Follower(StoreLine(self.store), feed, silence_s=0.01, batch_max=batch_max, upcasters=upcasters)
        service = write or self.write
        return ProcessRunner(
            [manager],
            1,
            follow=follower.follow,
            connect=lambda: postgres.connect(self.database.app, application_name="test-saga"),
            dispatcher=lambda news: dispatcher(
                service.send_batch, self.token_file, clock=self.clock, news=news, patience=self.patience
            ),
            clock=self.clock,
            announcements=announcements,
            upcasters=upcasters,
            archive=archive,
        )

    @asynccontextmanager
    async def running(self, runner: ProcessRunner | None = None) -> AsyncIterator[ProcessRunner]:
        """A running runner."""
        async with running(runner or self.runner()) as it:
            yield it

    @asynccontextmanager
    async def desk(
        self, manager: ProcessDefinition[Any] = GIFT, announcements: Announcements = NO_ANNOUNCEMENTS
    ) -> AsyncIterator[ProcessAdmin]:
        """The operators' side in another instance than the leader."""
        reads = Reads(self.database.app, application_name="test-desk")
        await reads.open()
        try:
            line = StoreLine(self.store)
            yield ProcessAdmin(reads, [manager], 1, clock=self.clock, line=line, announcements=announcements)
        finally:
            await reads.close()

    @asynccontextmanager
    async def steering(self) -> AsyncIterator[tuple[ProcessAdmin, Steering]]:
        """The operators' side, with all that they can steer."""
        async with self.desk() as desk:
            yield desk, Steering(desk.turns)

    # What is in the tables

    async def query(self, query: Any, *parameters: object) -> list[Any]:
        """Rows of the saga database."""
        async with connected(self.database.app) as connection:
            cursor = await connection.execute(query, parameters)
            return list(await cursor.fetchall())

    async def statuses(self) -> Counter[str]:
        """How many processes there are of each status."""
        return Counter(status for (status,) in await self.query("SELECT status FROM processes"))

    async def process(self, number: int) -> tuple[str, str, str, str]:
        """Status, trouble, attention and phase of an account's process."""
        rows = await self.query("SELECT status, trouble, attention, phase FROM processes WHERE process_id = %s", uid(number))
        assert rows, "not there yet"
        row: tuple[str, str, str, str] = rows[0]
        return row

    async def history(self, number: int) -> list[tuple[str, str]]:
        """The history of an account's process: kinds, with the step or name."""
        rows = await self.query("SELECT kind, step, name FROM process_history WHERE process_id = %s ORDER BY number", uid(number))
        return [(kind, step or name.rpartition(".")[2]) for kind, step, name in rows]


def key(number: int) -> ProcessKey:
    """The name of an account's process."""
    return TENANT, "gift", uid(number)


def refused_call(refusal: Refusal) -> CallFailed:
    """What a stub raises."""
    return CallFailed(refusal)

"""What the dispatcher makes of receipts and failed calls, row by row, and how it fills its calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from foldline.v1 import command_pb2
from shared.folds.errors import (
    AlreadyExists,
    BatchAborted,
    Forbidden,
    InternalError,
    Invalid,
    Late,
    NotFound,
    OverLimit,
    Refusal,
    Rejected,
    Unauthenticated,
    Unavailable,
    VersionMismatch,
)
from shared.processes.dispatcher import Dispatcher, RetryPolicy, Told
from shared.processes.records import CommandResult, DeliveryFailure, PendingCommand
from shared.rpc.status import to_status
from tests.support.domains.gifts import CallFailed
from tests.support.logs import capture_logs
from tests.support.system.waiting import eventually
from tests.support.system.working import running

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
COMPLETED, REJECTED, FAILED = (
    command_pb2.COMMAND_STATUS_COMPLETED,
    command_pb2.COMMAND_STATUS_REJECTED,
    command_pb2.COMMAND_STATUS_FAILED,
)


def command(number: int = 1, *, tries: int = 1, failures: int = 0, size: int = 10) -> PendingCommand:
    """A command on its way."""
    return PendingCommand("acme", "gift", "p", "s", 1, UUID(int=number), "bank.v1.X", b"x" * size, "", "", "", tries, failures)


@dataclass(slots=True)
class Clock:
    """A clock that stands until a test moves it."""

    now: datetime = NOW

    def __call__(self) -> datetime:
        return self.now


class Service:
    """Answers every item alike, or fails every call."""

    def __init__(
        self, status: command_pb2.CommandStatus.ValueType = COMPLETED, error: Refusal | None = None, *, call: bool = False
    ) -> None:
        self.status, self.error, self.call = status, error, call
        self.sizes: list[int] = []
        self.under_way = self.most = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def send_batch(self, request: command_pb2.SendBatchRequest, *, timeout: float, metadata: Any) -> Any:  # noqa: ASYNC109
        """`CommandServiceStub.SendBatch`."""
        self.sizes.append(len(request.items))
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await self.gate.wait()
        self.under_way -= 1
        if self.call and self.error is not None:
            raise CallFailed(self.error)
        receipt = command_pb2.CommandReceipt(status=self.status)
        if self.error is not None:
            receipt.error.CopyFrom(to_status(self.error))
        return command_pb2.SendBatchResponse(receipts=[receipt] * len(request.items))


@asynccontextmanager
async def dispatching(service: Service, tmp_path: Path, clock: Clock | None = None) -> AsyncIterator[Dispatcher]:
    """A dispatcher at work."""
    token_file = tmp_path / "token"
    token_file.write_text("t0ken")
    patience = RetryPolicy(first_s=1.0, longest_s=60.0, away_longest_s=4.0, failures_max=3)
    dispatcher = Dispatcher(service.send_batch, token_file, clock=clock or Clock(), news=asyncio.Event(), patience=patience)
    async with running(dispatcher):
        yield dispatcher


async def gathered(dispatcher: Dispatcher, count: int) -> list[Told]:
    """The next so many things that it tells."""
    collected: list[Told] = []

    def all_told() -> bool:
        collected.extend(dispatcher.take())
        return len(collected) >= count

    await eventually(all_told)
    assert len(collected) == count
    return collected


async def told(dispatcher: Dispatcher, commands: Sequence[PendingCommand]) -> list[Told]:
    """What becomes of the commands."""
    dispatcher.send(commands)
    return await gathered(dispatcher, len(commands))


@pytest.mark.parametrize(
    "refusal",
    [
        Rejected("INSUFFICIENT_FUNDS", "no"),
        Rejected("COMMAND_EXPIRED", "late"),
        NotFound("ACCOUNT_NOT_FOUND", "no"),
        AlreadyExists("TRANSFER_ALREADY_STARTED", "no"),
        Forbidden("ROLE_MISSING", "no"),
        Invalid("INVALID_REQUEST", "no"),
        VersionMismatch(1, 2),
        OverLimit("EVENT_TOO_LARGE", "no"),
    ],
    ids=lambda refusal: refusal.reason,
)
async def test_a_refusal_is_an_answer(refusal: Refusal, tmp_path: Path) -> None:
    """With its reason, and final."""
    async with dispatching(Service(REJECTED, refusal), tmp_path) as dispatcher:
        [answer] = await told(dispatcher, [command()])
    assert isinstance(answer, CommandResult)
    assert answer.reason == refusal.reason
    assert answer.error == to_status(refusal)


async def test_acceptance_is_an_answer(tmp_path: Path) -> None:
    """Whatever it appended."""
    async with dispatching(Service(), tmp_path) as dispatcher:
        [answer] = await told(dispatcher, [command()])
    assert answer == CommandResult(command(), None, "")


@pytest.mark.parametrize(
    ("status", "refusal", "undone", "failed"),
    [
        (REJECTED, Unavailable("DATABASE_UNAVAILABLE", "away"), False, False),
        (REJECTED, Unavailable("COMMAND_IN_FLIGHT", "under way"), False, False),
        (REJECTED, Late("DEADLINE_EXCEEDED", "late"), False, False),
        (REJECTED, OverLimit("QUEUE_FULL", "full", retry_after_s=0.5), True, False),
        (FAILED, InternalError(), True, True),
        (REJECTED, Invalid("COMMAND_ID_REUSED", "what?"), False, True),
        (REJECTED, Invalid("UNKNOWN_COMMAND", "what?"), True, False),
        (REJECTED, Invalid("UNKNOWN_FIELD", "what?"), True, False),
        (command_pb2.COMMAND_STATUS_STARTED, None, False, True),
        (command_pb2.COMMAND_STATUS_CANCELLED, BatchAborted(), False, True),
    ],
)
async def test_what_is_no_answer(
    status: command_pb2.CommandStatus.ValueType, refusal: Refusal | None, undone: bool, failed: bool, tmp_path: Path
) -> None:
    """Tried again; only what is certainly not carried out is said to be, and only defects count towards giving up."""
    async with dispatching(Service(status, refusal), tmp_path) as dispatcher:
        first, last = await told(dispatcher, [command(1), command(2, failures=2)])
    assert isinstance(first, DeliveryFailure)
    assert isinstance(last, DeliveryFailure)
    assert (first.undone, first.failed, first.given_up) == (undone, failed, "")
    assert last.given_up == ("COMMAND_FAILED" if failed else "")


@pytest.mark.parametrize(
    ("refusal", "undone"),
    [
        (Unavailable("AWAY", "away"), False),
        (Late("DEADLINE_EXCEEDED", "late"), False),
        (OverLimit("TENANT_OVER_QUOTA", "full", retry_after_s=0.01), True),
        (Unauthenticated("TOKEN_EXPIRED", "renew it"), True),
        (Forbidden("ROLE_MISSING", "no"), True),
    ],
    ids=lambda it: it.reason if isinstance(it, Refusal) else "",
)
async def test_a_failed_call_is_nobodys_fault(refusal: Refusal, undone: bool, tmp_path: Path) -> None:
    """All its commands wait, and none is given up, however often that happens."""
    async with dispatching(Service(error=refusal, call=True), tmp_path) as dispatcher:
        troubles = await told(dispatcher, [command(number, failures=2) for number in range(5)])
    assert {type(it) for it in troubles} == {DeliveryFailure}
    assert [(it.undone, it.failed, it.given_up) for it in troubles if isinstance(it, DeliveryFailure)] == [
        (undone, False, "")
    ] * 5


@pytest.mark.parametrize("refusal", [InternalError(), Invalid("INVALID_REQUEST", "no"), OverLimit("MESSAGE_TOO_LARGE", "no")])
async def test_a_call_that_one_command_may_have_spoilt_is_made_for_each(refusal: Refusal, tmp_path: Path) -> None:
    """So only the culprit is in trouble; here all are."""
    service = Service(error=refusal, call=True)
    async with dispatching(service, tmp_path) as dispatcher:
        troubles = await told(dispatcher, [command(number) for number in range(4)])
    assert service.sizes == [4, 1, 1, 1, 1]
    assert [it.failed for it in troubles if isinstance(it, DeliveryFailure)] == [True] * 4


@pytest.mark.parametrize("call", [False, True], ids=["a command", "a call"])
@pytest.mark.parametrize("reason", ["UNKNOWN_FIELD", "UNKNOWN_COMMAND"])
async def test_a_write_service_of_an_older_release_is_waited_for(reason: str, call: bool, tmp_path: Path) -> None:
    """For an hour nothing is given up; the log says what is waited for, and nothing of the command."""
    service = Service(REJECTED, Invalid(reason, "what is secret?"), call=call)
    async with dispatching(service, tmp_path) as dispatcher:
        with capture_logs() as lines:
            troubles = await told(dispatcher, [command(1, tries=99, failures=2), command(2)])
        assert [(it.undone, it.failed, it.given_up) for it in troubles if isinstance(it, DeliveryFailure)] == [
            (True, False, "")
        ] * 2
        warned = [line for line in lines if line["event"] == "write_service_of_older_release"]
        assert sum(line["commands"] for line in warned) == 2
        assert {line["error"] for line in warned} == {reason}
        service.call, service.status, service.error = False, COMPLETED, None
        assert [type(it) for it in await told(dispatcher, [command(1), command(2)])] == [CommandResult] * 2


@pytest.mark.parametrize("call", [False, True], ids=["a command", "a call"])
async def test_what_no_write_service_knows_is_given_up_in_the_end(call: bool, tmp_path: Path) -> None:
    """After an hour in which it was never known, by a name of its own; another answer in between begins the hour anew."""
    clock = Clock()
    unknown, away = Invalid("UNKNOWN_COMMAND", "what?"), Unavailable("AWAY", "away")
    service = Service(REJECTED, unknown, call=call)
    async with dispatching(service, tmp_path, clock) as dispatcher:

        async def given_up_after(minutes: int, refusal: Refusal) -> str:
            clock.now += timedelta(minutes=minutes)
            service.error = refusal
            [trouble] = await told(dispatcher, [command()])
            assert isinstance(trouble, DeliveryFailure)
            assert trouble.undone == (refusal is unknown)
            return trouble.given_up

        for minutes in (0, 59):
            assert not await given_up_after(minutes, unknown)
        assert not await given_up_after(0, away)
        for minutes in (0, 59):
            assert not await given_up_after(minutes, unknown)
        assert await given_up_after(1, unknown) == "COMMAND_UNKNOWN"
        assert not await given_up_after(0, unknown)
        for number in range(2, 5):  # of processes that do without them
            await told(dispatcher, [command(number)])
        clock.now += timedelta(hours=3)
        await told(dispatcher, [command(5)])
        assert [name[1] for name in dispatcher._unknown_since] == [UUID(int=5)]
        clock.now += timedelta(hours=3)  # as when the process was suspended
        [trouble] = await told(dispatcher, [command(5)])
        assert isinstance(trouble, DeliveryFailure)
        assert (trouble.given_up, trouble.failed) == ("COMMAND_UNKNOWN", False)


@pytest.mark.parametrize(
    "refusal", [Unauthenticated("TOKEN_EXPIRED", "renew it"), Forbidden("ROLE_MISSING", "no"), Unavailable("AWAY", "away")]
)
async def test_calls_that_are_refused_for_long_are_told_of(refusal: Refusal, tmp_path: Path) -> None:
    """By name and since when; not once a call is answered, and not when nothing is sent any more."""
    clock, service = Clock(), Service(error=refusal, call=True)
    async with dispatching(service, tmp_path, clock) as dispatcher:

        async def told_after(seconds: int) -> str:
            clock.now += timedelta(seconds=seconds)
            await told(dispatcher, [command()])
            return dispatcher.standstill()

        dispatcher._patience = replace(dispatcher._patience, first_s=0.01, away_longest_s=0.01)
        assert [await told_after(0), await told_after(59)] == ["", ""]
        since = "CALLS_REFUSED: since 2026-01-02T03:04:05Z the write service refuses every call as "
        assert await told_after(1) == since + refusal.reason
        clock.now += timedelta(seconds=61)
        assert dispatcher.standstill() == ""
        assert await told_after(0) == since + refusal.reason
        service.error = None
        assert await told_after(0) == ""
        service.error = refusal
        assert await told_after(0) == ""


@pytest.mark.parametrize(("tries", "at_least", "at_most"), [(1, 0.5, 1), (2, 1, 2), (3, 2, 4), (9, 2, 4)])
async def test_waits_double_up_to_a_limit(tries: int, at_least: float, at_most: float, tmp_path: Path) -> None:
    """With jitter between half and all of it."""
    async with dispatching(Service(REJECTED, Unavailable("AWAY", "x", retry_after_s=0)), tmp_path) as dispatcher:
        [trouble] = await told(dispatcher, [command(tries=tries)])
    assert isinstance(trouble, DeliveryFailure)
    assert timedelta(seconds=at_least) <= trouble.due_at - NOW <= timedelta(seconds=at_most)


async def test_what_the_other_side_asks_to_wait_is_waited(tmp_path: Path) -> None:
    """Its RetryInfo is the least."""
    async with dispatching(Service(REJECTED, Unavailable("AWAY", "x", retry_after_s=9)), tmp_path) as dispatcher:
        [trouble] = await told(dispatcher, [command()])
    assert isinstance(trouble, DeliveryFailure)
    assert trouble.due_at == NOW + timedelta(seconds=9)


async def test_few_commands_wait_for_no_call(tmp_path: Path) -> None:
    """Each is sent at once while up to eight are under way; the next ones gather until one of the calls has returned."""
    service = Service()
    service.gate.clear()
    async with dispatching(service, tmp_path) as dispatcher:
        for number in range(8):
            dispatcher.send([command(number)])
            await eventually(lambda: not dispatcher.backlog)
        await eventually(lambda: service.sizes == [1] * 8)
        dispatcher.send(command(number) for number in range(8, 12))
        await asyncio.sleep(0.02)
        assert service.sizes == [1] * 8
        service.gate.set()
        await gathered(dispatcher, 12)
    assert sum(service.sizes) == 12


async def test_while_calls_are_under_way_the_next_gathers(tmp_path: Path) -> None:
    """One call for many commands, more beside it for more, four at the most; 256 commands in a call."""
    service = Service()
    service.gate.clear()
    async with dispatching(service, tmp_path) as dispatcher:
        dispatcher.send([command(0)])
        await eventually(lambda: service.sizes == [1])
        dispatcher.send(command(number) for number in range(1, 64))
        await asyncio.sleep(0.02)
        assert service.sizes == [1]
        dispatcher.send(command(number) for number in range(64, 1000))
        await eventually(lambda: len(service.sizes) == 4)
        service.gate.set()
        await gathered(dispatcher, 1000)
    assert service.most == 4
    assert service.sizes == [1, 256, 256, 256, 231]


async def test_large_commands_travel_in_smaller_batches(tmp_path: Path) -> None:
    """Below what the write service takes in one message."""
    service = Service()
    async with dispatching(service, tmp_path) as dispatcher:
        await told(dispatcher, [command(number, size=1_000_000) for number in range(7)])
    assert max(service.sizes) == 3


async def test_a_command_is_not_in_two_calls_at_once(tmp_path: Path) -> None:
    """What is asked about again while it waits, or is under way, is left alone."""
    service = Service()
    service.gate.clear()
    async with dispatching(service, tmp_path) as dispatcher:
        dispatcher.send([command(1), command(1)])
        await eventually(lambda: service.sizes == [1])
        dispatcher.send([command(1), command(2)])
        service.gate.set()
        await gathered(dispatcher, 2)
        assert len(await told(dispatcher, [command(1)])) == 1
    assert service.sizes == [1, 1, 1]

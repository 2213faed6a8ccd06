"""A caller of the public API, and what it was told when it was refused."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar
from uuid import uuid4

import grpc.aio
from google.protobuf.any_pb2 import Any as Packed
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from bank.v1 import (
    account_pb2,
    account_pb2_grpc,
    account_query_pb2,
    account_query_pb2_grpc,
    person_pb2,
    person_pb2_grpc,
    person_query_pb2,
    person_query_pb2_grpc,
    transfer_pb2,
    transfer_pb2_grpc,
    transfer_query_pb2,
    transfer_query_pb2_grpc,
    user_pb2,
    user_pb2_grpc,
    user_query_pb2,
    user_query_pb2_grpc,
)
from deploy.local.system import READ, WRITE, System
from foldline.v1 import command_pb2, command_pb2_grpc, event_store_pb2, event_store_pb2_grpc, projection_pb2_grpc
from shared.platform.identity import Role
from shared.rpc.client import bearer
from tests.support.system.waiting import eventually

T = TypeVar("T")

CALL_TIMEOUT_S = 20.0
"""Longer than anything should take, even on a machine that does much else."""


def new_id() -> str:
    """A fresh UUID."""
    return str(uuid4())


def options(command_id: str | None = None, **more: Any) -> command_pb2.CommandOptions:
    """What begins every command; with a fresh command id unless one is given."""
    return command_pb2.CommandOptions(command_id=command_id or new_id(), **more)


def packed(command: Message) -> Packed:
    """The command as CommandService takes it."""
    wrapped = Packed()
    wrapped.Pack(command)
    return wrapped


def item(command: Message, **more: str) -> command_pb2.BatchItem:
    """The command as an item of a batch."""
    return command_pb2.BatchItem(command=packed(command), **more)


@dataclass(frozen=True, slots=True)
class Refused:
    """What a caller is told: the status code, and what its details say."""

    code: str
    text: str
    reason: str = ""
    fields: tuple[str, ...] = ()
    retry_after_s: float | None = None
    facts: Mapping[str, str] = field(default_factory=dict)


def read_refusal(error: grpc.aio.AioRpcError) -> Refused:
    """Reads a failed call's details as any client of gRPC would: by google.rpc alone."""
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            assert isinstance(value, bytes)
            return read_status(status_pb2.Status.FromString(value), error.code().name)
    return Refused(error.code().name, error.details() or "")


def read_status(status: status_pb2.Status, code: str = "") -> Refused:
    """Reads a status, as receipts of batches carry it."""
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    for detail in status.details:
        assert any(detail.Unpack(known) for known in (info, bad, retry)), detail.type_url
    names = {known.value[0]: known.name for known in grpc.StatusCode}
    assert not code or names[status.code] == code, "the details contradict the status"
    return Refused(
        names[status.code],
        status.message,
        info.reason,
        tuple(violation.field for violation in bad.field_violations),
        retry.retry_delay.ToTimedelta().total_seconds() if retry.HasField("retry_delay") else None,
        dict(info.metadata),
    )


async def refused(call: Awaitable[object]) -> Refused:
    """Makes a call that must be refused, and returns how."""
    try:
        answer = await call
    except grpc.aio.AioRpcError as error:
        return read_refusal(error)
    raise AssertionError(f"accepted: {answer}")


class Bank:
    """One caller: stubs of every service, each call with the caller's token and a deadline."""

    def __init__(self, write: grpc.aio.Channel, read: grpc.aio.Channel, token: str) -> None:
        self.write = write
        self.read = read
        self.token = token
        self.who = bearer(token)
        self.people = person_pb2_grpc.PersonServiceStub(write)
        self.accounts = account_pb2_grpc.AccountServiceStub(write)
        self.transfers = transfer_pb2_grpc.TransferServiceStub(write)
        self.users = user_pb2_grpc.UserServiceStub(write)
        self.commands = command_pb2_grpc.CommandServiceStub(write)
        self.events = event_store_pb2_grpc.EventStoreServiceStub(write)
        self.person_queries = person_query_pb2_grpc.PersonQueryServiceStub(read)
        self.account_queries = account_query_pb2_grpc.AccountQueryServiceStub(read)
        self.transfer_queries = transfer_query_pb2_grpc.TransferQueryServiceStub(read)
        self.user_queries = user_query_pb2_grpc.UserQueryServiceStub(read)
        self.projections = projection_pb2_grpc.ProjectionServiceStub(read)

    async def call(
        self, method: Any, request: Any, *, more: Iterable[tuple[str, str]] = (), timeout_s: float = CALL_TIMEOUT_S
    ) -> Any:
        """One unary call: `bank.call(bank.people.RegisterPerson, request)`."""
        return await method(request, metadata=(*self.who, *more), timeout=timeout_s)

    async def collect(self, method: Any, request: Any, *, timeout_s: float = CALL_TIMEOUT_S) -> list[Any]:
        """All messages of a call that answers with a stream."""
        return [answer async for answer in method(request, metadata=self.who, timeout=timeout_s)]

    # Commands

    async def register(self, name: str, person_id: str | None = None) -> tuple[str, command_pb2.CommandReceipt]:
        """Registers a person; returns the id and the receipt."""
        person_id = person_id or new_id()
        return person_id, await self.call(self.people.RegisterPerson, register(person_id, name))

    async def rename(self, person_id: str, name: str) -> command_pb2.CommandReceipt:
        """Renames a person."""
        receipt: command_pb2.CommandReceipt = await self.call(self.people.RenamePerson, rename(person_id, name))
        return receipt

    async def open(self, owner_id: str, currency: str = "USD", *, name: str = "blue") -> tuple[str, command_pb2.CommandReceipt]:
        """Opens an account; returns its id and the receipt."""
        account_id = new_id()
        return account_id, await self.call(self.accounts.OpenAccount, open_account(account_id, owner_id, currency, name))

    async def deposit(self, account_id: str, amount_minor: int, currency: str = "USD") -> command_pb2.CommandReceipt:
        """Puts money on an account."""
        receipt: command_pb2.CommandReceipt = await self.call(
            self.accounts.DepositMoney, deposit(account_id, amount_minor, currency)
        )
        return receipt

    async def round_trip(self, account_id: str) -> bool:
        """Whether a deposit is answered and seen by a query; not while anything on the way is UNAVAILABLE."""
        try:
            receipt = await self.deposit(account_id, 1)
            summary = await self.account(account_id, receipt.consistency_token)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                return False
            raise
        return summary.version >= receipt.version

    async def withdraw(self, account_id: str, amount_minor: int, currency: str = "USD") -> command_pb2.CommandReceipt:
        """Takes money from an account."""
        receipt: command_pb2.CommandReceipt = await self.call(
            self.accounts.WithdrawMoney, withdraw(account_id, amount_minor, currency)
        )
        return receipt

    async def freeze(self, account_id: str) -> command_pb2.CommandReceipt:
        """Freezes an account."""
        receipt: command_pb2.CommandReceipt = await self.call(self.accounts.FreezeAccount, freeze(account_id))
        return receipt

    async def unfreeze(self, account_id: str) -> command_pb2.CommandReceipt:
        """Unfreezes an account."""
        receipt: command_pb2.CommandReceipt = await self.call(self.accounts.UnfreezeAccount, unfreeze(account_id))
        return receipt

    async def close(self, account_id: str) -> command_pb2.CommandReceipt:
        """Closes an account."""
        receipt: command_pb2.CommandReceipt = await self.call(self.accounts.CloseAccount, close(account_id))
        return receipt

    async def transfer(
        self, source: str, target: str, amount_minor: int, currency: str = "USD", transfer_id: str | None = None
    ) -> tuple[str, command_pb2.CommandReceipt]:
        """Starts a transfer; returns its id and the receipt."""
        transfer_id = transfer_id or new_id()
        request = start_transfer(transfer_id, source, target, amount_minor, currency)
        return transfer_id, await self.call(self.transfers.StartTransfer, request)

    async def register_user(
        self, login: str, password: str, user_id: str | None = None
    ) -> tuple[str, command_pb2.CommandReceipt]:
        """Starts a user's registration; returns the user's id and the receipt."""
        user_id = user_id or new_id()
        return user_id, await self.call(self.users.StartUserRegistration, start_registration(user_id, login, password))

    async def verify(self, login: str, password: str) -> str:
        """Whose login it is, if the password is right."""
        request = user_pb2.VerifyPasswordRequest(login=login, password=password)
        user_id: str = (await self.call(self.users.VerifyPassword, request)).user_id
        return user_id

    async def batch(self, *items: command_pb2.BatchItem, atomic: bool = False) -> list[command_pb2.CommandReceipt]:
        """Sends a batch; returns its receipts."""
        request = command_pb2.SendBatchRequest(items=items, atomic=atomic)
        return list((await self.call(self.commands.SendBatch, request)).receipts)

    async def command(self, command_id: str) -> command_pb2.CommandRecord:
        """What the command log says of a command."""
        request = command_pb2.GetCommandRequest(command_id=command_id)
        record: command_pb2.CommandRecord = (await self.call(self.commands.GetCommand, request)).command
        return record

    # Queries

    async def person(self, person_id: str, token: str = "") -> person_query_pb2.PersonSummary:
        """A person's summary, not older than the consistency token."""
        request = person_query_pb2.GetPersonRequest(person_id=person_id, consistency_token=token)
        summary: person_query_pb2.PersonSummary = (await self.call(self.person_queries.GetPerson, request)).person
        return summary

    async def account(self, account_id: str, token: str = "") -> account_query_pb2.AccountSummary:
        """An account's summary, not older than the consistency token."""
        request = account_query_pb2.GetAccountRequest(account_id=account_id, consistency_token=token)
        summary: account_query_pb2.AccountSummary = (await self.call(self.account_queries.GetAccount, request)).account
        return summary

    async def transfer_summary(self, transfer_id: str, token: str = "") -> transfer_query_pb2.TransferSummary:
        """A transfer's summary, not older than the consistency token."""
        request = transfer_query_pb2.GetTransferRequest(transfer_id=transfer_id, consistency_token=token)
        summary: transfer_query_pb2.TransferSummary = (await self.call(self.transfer_queries.GetTransfer, request)).transfer
        return summary

    async def ended_transfer(
        self, started: tuple[str, command_pb2.CommandReceipt], deadline_s: float = 60
    ) -> transfer_query_pb2.TransferSummary:
        """The summary of a transfer that was started, when it has ended."""
        transfer_id, receipt = started

        async def ended() -> transfer_query_pb2.TransferSummary | None:
            summary = await self.transfer_summary(transfer_id, receipt.consistency_token)
            return None if summary.status == transfer_query_pb2.TRANSFER_STATUS_STARTED else summary

        summary = await eventually(ended, deadline_s, every_s=0.05)
        assert summary is not None
        return summary

    async def user(self, user_id: str, token: str = "") -> user_query_pb2.UserSummary:
        """A user's summary, not older than the consistency token."""
        request = user_query_pb2.GetUserRequest(user_id=user_id, consistency_token=token)
        summary: user_query_pb2.UserSummary = (await self.call(self.user_queries.GetUser, request)).user
        return summary

    async def ended_registration(
        self, started: tuple[str, command_pb2.CommandReceipt], deadline_s: float = 60
    ) -> user_query_pb2.UserSummary:
        """The summary of a user whose registration was started, when it has ended."""
        user_id, receipt = started

        async def ended() -> user_query_pb2.UserSummary | None:
            summary = await self.user(user_id, receipt.consistency_token)
            return None if summary.status == user_query_pb2.REGISTRATION_STATUS_STARTED else summary

        summary = await eventually(ended, deadline_s, every_s=0.05)
        assert summary is not None
        return summary

    async def stream(self, aggregate_type: str, aggregate_id: str, **more: int) -> list[event_store_pb2.EventEnvelope]:
        """The events of an aggregate."""
        request = event_store_pb2.ReadStreamRequest(aggregate_type=aggregate_type, aggregate_id=aggregate_id, **more)
        return [event for answer in await self.collect(self.events.ReadStream, request) for event in answer.events]

    async def line(self, from_position: int = 0, events_max: int = 0) -> list[event_store_pb2.EventEnvelope]:
        """The events of all tenants, by position. Needs role `reader`."""
        request = event_store_pb2.ReadAllRequest(from_position=from_position, events_max=events_max)
        answers = await self.collect(self.events.ReadAll, request, timeout_s=60)
        return [event for answer in answers for event in answer.events]


def register(person_id: str, name: str, **more: Any) -> person_pb2.RegisterPersonRequest:
    """RegisterPerson; `more` goes into the options."""
    return person_pb2.RegisterPersonRequest(options=options(**more), person_id=person_id, name=name)


def rename(person_id: str, name: str, **more: Any) -> person_pb2.RenamePersonRequest:
    """RenamePerson; `more` goes into the options."""
    return person_pb2.RenamePersonRequest(options=options(**more), person_id=person_id, name=name)


def open_account(
    account_id: str, owner_id: str, currency: str = "USD", name: str = "blue", **more: Any
) -> account_pb2.OpenAccountRequest:
    """OpenAccount; `more` goes into the options."""
    return account_pb2.OpenAccountRequest(
        options=options(**more), account_id=account_id, owner_id=owner_id, currency=currency, name=name
    )


def deposit(account_id: str, amount_minor: int, currency: str = "USD", **more: Any) -> account_pb2.DepositMoneyRequest:
    """DepositMoney; `more` goes into the options."""
    return account_pb2.DepositMoneyRequest(
        options=options(**more), account_id=account_id, amount_minor=amount_minor, currency=currency
    )


def withdraw(account_id: str, amount_minor: int, currency: str = "USD", **more: Any) -> account_pb2.WithdrawMoneyRequest:
    """WithdrawMoney; `more` goes into the options."""
    return account_pb2.WithdrawMoneyRequest(
        options=options(**more), account_id=account_id, amount_minor=amount_minor, currency=currency
    )


def freeze(account_id: str, **more: Any) -> account_pb2.FreezeAccountRequest:
    """FreezeAccount; `more` goes into the options."""
    return account_pb2.FreezeAccountRequest(options=options(**more), account_id=account_id)


def unfreeze(account_id: str, **more: Any) -> account_pb2.UnfreezeAccountRequest:
    """UnfreezeAccount; `more` goes into the options."""
    return account_pb2.UnfreezeAccountRequest(options=options(**more), account_id=account_id)


def close(account_id: str, **more: Any) -> account_pb2.CloseAccountRequest:
    """CloseAccount; `more` goes into the options."""
    return account_pb2.CloseAccountRequest(options=options(**more), account_id=account_id)


def start_transfer(
    transfer_id: str, source: str, target: str, amount_minor: int, currency: str = "USD", **more: Any
) -> transfer_pb2.StartTransferRequest:
    """StartTransfer; `more` goes into the options."""
    return transfer_pb2.StartTransferRequest(
        options=options(**more),
        transfer_id=transfer_id,
        from_account_id=source,
        to_account_id=target,
        amount_minor=amount_minor,
        currency=currency,
    )


def start_registration(
    user_id: str, login: str, password: str, *, email: str = "somebody@example.com", **more: Any
) -> user_pb2.StartUserRegistrationRequest:
    """StartUserRegistration; `more` goes into the options."""
    return user_pb2.StartUserRegistrationRequest(
        options=options(**more), user_id=user_id, login=login, email=email, password=password
    )


@asynccontextmanager
async def channels(
    system: System, write: str = WRITE, read: str = READ
) -> AsyncIterator[tuple[grpc.aio.Channel, grpc.aio.Channel]]:
    """Channels to a write service and a read service."""
    async with system.channel(write) as to_write, system.channel(read) as to_read:
        yield to_write, to_read


@asynccontextmanager
async def auditor(system: System) -> AsyncIterator[Bank]:
    """A caller that may read the line of all tenants."""
    async with channels(system) as (write, read):
        yield Bank(write, read, system.token("operators", "olga", [Role.READER]))

"""A client of the bank's public API, in the generated messages: the demo, the command line and the tests use it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from datetime import datetime
from typing import Any, TypeVar

import grpc.aio
from google.protobuf.message import Message

from bank.v1 import (
    account_pb2_grpc,
    account_query_pb2,
    account_query_pb2_grpc,
    person_pb2_grpc,
    person_query_pb2,
    person_query_pb2_grpc,
    transfer_pb2_grpc,
    transfer_query_pb2,
    transfer_query_pb2_grpc,
    user_pb2,
    user_pb2_grpc,
    user_query_pb2,
    user_query_pb2_grpc,
)
from deploy.bank_requests import (
    change_email,
    change_roles,
    close,
    close_person,
    deactivate,
    deposit,
    freeze,
    new_id,
    open_account,
    options,
    packed,
    register,
    rename,
    start_registration,
    start_transfer,
    unfreeze,
    withdraw,
)
from foldline.v1 import (
    archive_pb2_grpc,
    audit_pb2_grpc,
    command_pb2,
    command_pb2_grpc,
    event_store_pb2,
    event_store_pb2_grpc,
    history_pb2_grpc,
    override_pb2,
    override_pb2_grpc,
    projection_pb2_grpc,
    schedule_pb2_grpc,
)
from shared.platform.clock import timestamp
from shared.rpc.client import bearer

T = TypeVar("T")
Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)

CALL_TIMEOUT_S = 20.0
"""Longer than any call should take, even on a busy machine."""
LINE_TIMEOUT_S = 60.0
ENDS_WITHIN_S = 60.0
ASK_AGAIN_S = 0.05


class NotEnded(Exception):
    """A transfer, a registration or a scheduled command did not end in time."""


class Bank:
    """One caller: a method for each thing to do or ask, and the stubs. Each call carries the caller's token and a deadline.

    A call that a service refuses raises `grpc.aio.AioRpcError`.
    """

    def __init__(self, write: grpc.aio.Channel, read: grpc.aio.Channel, token: str, *, timeout_s: float = CALL_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self.write = write
        self.read = read
        self.token = token
        self.who = bearer(token)
        self.people = person_pb2_grpc.PersonServiceStub(write)
        self.accounts = account_pb2_grpc.AccountServiceStub(write)
        self.transfers = transfer_pb2_grpc.TransferServiceStub(write)
        self.users = user_pb2_grpc.UserServiceStub(write)
        self.commands = command_pb2_grpc.CommandServiceStub(write)
        self.overrides = override_pb2_grpc.OverrideServiceStub(write)
        self.archive = archive_pb2_grpc.ArchiveServiceStub(write)
        self.history = history_pb2_grpc.HistoryServiceStub(write)
        self.audit = audit_pb2_grpc.AuditServiceStub(write)
        self.schedules = schedule_pb2_grpc.ScheduleServiceStub(write)
        self.events = event_store_pb2_grpc.EventStoreServiceStub(write)
        self.person_queries = person_query_pb2_grpc.PersonQueryServiceStub(read)
        self.account_queries = account_query_pb2_grpc.AccountQueryServiceStub(read)
        self.transfer_queries = transfer_query_pb2_grpc.TransferQueryServiceStub(read)
        self.user_queries = user_query_pb2_grpc.UserQueryServiceStub(read)
        self.projections = projection_pb2_grpc.ProjectionServiceStub(read)

    async def call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        *,
        more: Iterable[tuple[str, str]] = (),
        timeout_s: float | None = None,
    ) -> Response:
        """The answer of a unary call: `bank.call(bank.people.RegisterPerson, request)`. `more` is added to the metadata."""
        return await method(request, metadata=(*self.who, *more), timeout=timeout_s or self._timeout_s)

    async def collect(
        self,
        method: grpc.aio.UnaryStreamMultiCallable[Request, Response],
        request: Request,
        *,
        timeout_s: float | None = None,
    ) -> list[Response]:
        """All messages of a call that answers with a stream."""
        return [answer async for answer in method(request, metadata=self.who, timeout=timeout_s or self._timeout_s)]

    # Commands

    async def register(self, name: str, person_id: str | None = None) -> tuple[str, command_pb2.CommandReceipt]:
        """Registers a person; returns the id and the receipt."""
        person_id = person_id or new_id()
        return person_id, await self.call(self.people.RegisterPerson, register(person_id, name))

    async def rename(self, person_id: str, name: str) -> command_pb2.CommandReceipt:
        """Renames a person."""
        return await self.call(self.people.RenamePerson, rename(person_id, name))

    async def close_person(self, person_id: str) -> command_pb2.CommandReceipt:
        """Closes a person and all of the person's accounts, which must be empty."""
        return await self.call(self.people.ClosePerson, close_person(person_id))

    async def open(self, owner_id: str, currency: str = "USD", *, name: str = "blue") -> tuple[str, command_pb2.CommandReceipt]:
        """Opens an account; returns its id and the receipt."""
        account_id = new_id()
        return account_id, await self.call(self.accounts.OpenAccount, open_account(account_id, owner_id, currency, name))

    async def deposit(self, account_id: str, amount_minor: int, currency: str = "USD") -> command_pb2.CommandReceipt:
        """Puts money on an account."""
        return await self.call(self.accounts.DepositMoney, deposit(account_id, amount_minor, currency))

    async def withdraw(self, account_id: str, amount_minor: int, currency: str = "USD") -> command_pb2.CommandReceipt:
        """Takes money from an account."""
        return await self.call(self.accounts.WithdrawMoney, withdraw(account_id, amount_minor, currency))

    async def freeze(self, account_id: str) -> command_pb2.CommandReceipt:
        """Freezes an account."""
        return await self.call(self.accounts.FreezeAccount, freeze(account_id))

    async def unfreeze(self, account_id: str) -> command_pb2.CommandReceipt:
        """Unfreezes an account."""
        return await self.call(self.accounts.UnfreezeAccount, unfreeze(account_id))

    async def close(self, account_id: str) -> command_pb2.CommandReceipt:
        """Closes an account."""
        return await self.call(self.accounts.CloseAccount, close(account_id))

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

    async def change_email(self, user_id: str, email: str) -> command_pb2.CommandReceipt:
        """Gives a user another e-mail address."""
        return await self.call(self.users.ChangeUserEmail, change_email(user_id, email))

    async def change_roles(self, user_id: str, *roles: str) -> command_pb2.CommandReceipt:
        """Gives a user these roles and no other."""
        return await self.call(self.users.ChangeUserRoles, change_roles(user_id, *roles))

    async def deactivate(self, user_id: str) -> command_pb2.CommandReceipt:
        """Deactivates a user, whose login is then free."""
        return await self.call(self.users.DeactivateUser, deactivate(user_id))

    async def verify(self, login: str, password: str) -> str:
        """The id of the user with this login and password."""
        request = user_pb2.VerifyPasswordRequest(login=login, password=password)
        return (await self.call(self.users.VerifyPassword, request)).user_id

    async def batch(self, *items: command_pb2.BatchItem, atomic: bool = False) -> list[command_pb2.CommandReceipt]:
        """Sends a batch; returns its receipts."""
        request = command_pb2.SendBatchRequest(items=items, atomic=atomic)
        return list((await self.call(self.commands.SendBatch, request)).receipts)

    async def command(self, command_id: str) -> command_pb2.CommandRecord:
        """The command's row in the log."""
        request = command_pb2.GetCommandRequest(command_id=command_id)
        return (await self.call(self.commands.GetCommand, request)).command

    async def ended_command(self, command_id: str, deadline_s: float = ENDS_WITHIN_S) -> command_pb2.CommandReceipt:
        """The receipt of a scheduled command when it has run or was cancelled. Raises NotEnded."""

        async def ended() -> command_pb2.CommandReceipt | None:
            receipt = (await self.command(command_id)).receipt
            return None if receipt.status == command_pb2.COMMAND_STATUS_SCHEDULED else receipt

        return await _until(ended, deadline_s, f"the command {command_id}")

    async def schedule(self, command: Message, due_at: datetime) -> command_pb2.CommandReceipt:
        """Schedules a command; returns its row in the log."""
        request = command_pb2.ScheduleRequest(command=packed(command), due_at=timestamp(due_at))
        return (await self.call(self.commands.Schedule, request)).receipt

    async def reschedule(self, command_id: str, due_at: datetime) -> command_pb2.CommandReceipt:
        """Moves a scheduled command to another time."""
        request = command_pb2.RescheduleRequest(command_id=command_id, due_at=timestamp(due_at))
        return (await self.call(self.commands.Reschedule, request)).receipt

    async def switch_override(self, name: str, on: bool) -> command_pb2.CommandReceipt:
        """Switches an override of the caller's tenant."""
        return await self.call(
            self.overrides.SwitchOverride, override_pb2.SwitchOverrideRequest(options=options(), name=name, on=on)
        )

    async def list_overrides(self) -> list[override_pb2.Override]:
        """What runs otherwise for the caller's tenant."""
        answer = await self.call(self.overrides.ListOverrides, override_pb2.ListOverridesRequest())
        return list(answer.overrides)

    async def cancel(self, command_id: str) -> command_pb2.CommandReceipt:
        """Cancels a scheduled command."""
        return (await self.call(self.commands.Cancel, command_pb2.CancelRequest(command_id=command_id))).receipt

    async def list_commands(self, size: int = 0, token: str = "", **wanted: Any) -> command_pb2.ListCommandsResponse:
        """A page of the command log, the newest first, of the commands that match the filter."""
        filter_ = command_pb2.CommandFilter(**wanted)
        request = command_pb2.ListCommandsRequest(page_size=size, page_token=token, filter=filter_, counted=True)
        return await self.call(self.commands.ListCommands, request)

    # Queries

    async def person(self, person_id: str, token: str = "") -> person_query_pb2.PersonSummary:
        """A person's summary, not older than the consistency token."""
        request = person_query_pb2.GetPersonRequest(person_id=person_id, consistency_token=token)
        return (await self.call(self.person_queries.GetPerson, request)).person

    async def account(self, account_id: str, token: str = "") -> account_query_pb2.AccountSummary:
        """An account's summary, not older than the consistency token."""
        request = account_query_pb2.GetAccountRequest(account_id=account_id, consistency_token=token)
        return (await self.call(self.account_queries.GetAccount, request)).account

    async def account_now(self, account_id: str) -> account_query_pb2.AccountSummary:
        """An account's summary with all events that the account has now, those that processes caused included.

        To have seen a transfer ended is no promise of it: each group of tables follows the line on its own.
        """
        last = (await self.stream("account", account_id))[-1]
        return await self.account(account_id, (await self.command(last.metadata.command_id)).receipt.consistency_token)

    async def transfer_summary(self, transfer_id: str, token: str = "") -> transfer_query_pb2.TransferSummary:
        """A transfer's summary, not older than the consistency token."""
        request = transfer_query_pb2.GetTransferRequest(transfer_id=transfer_id, consistency_token=token)
        return (await self.call(self.transfer_queries.GetTransfer, request)).transfer

    async def ended_transfer(
        self, started: tuple[str, command_pb2.CommandReceipt], deadline_s: float = ENDS_WITHIN_S
    ) -> transfer_query_pb2.TransferSummary:
        """The summary of a transfer that was started, when it has ended. Raises NotEnded."""
        transfer_id, receipt = started

        async def ended() -> transfer_query_pb2.TransferSummary | None:
            summary = await self.transfer_summary(transfer_id, receipt.consistency_token)
            return None if summary.status == transfer_query_pb2.TRANSFER_STATUS_STARTED else summary

        return await _until(ended, deadline_s, f"the transfer {transfer_id}")

    async def user(self, user_id: str, token: str = "") -> user_query_pb2.UserSummary:
        """A user's summary, not older than the consistency token."""
        request = user_query_pb2.GetUserRequest(user_id=user_id, consistency_token=token)
        return (await self.call(self.user_queries.GetUser, request)).user

    async def ended_registration(
        self, started: tuple[str, command_pb2.CommandReceipt], deadline_s: float = ENDS_WITHIN_S
    ) -> user_query_pb2.UserSummary:
        """The summary of a user whose registration was started, when it has ended. Raises NotEnded."""
        user_id, receipt = started

        async def ended() -> user_query_pb2.UserSummary | None:
            summary = await self.user(user_id, receipt.consistency_token)
            return None if summary.status == user_query_pb2.REGISTRATION_STATUS_STARTED else summary

        return await _until(ended, deadline_s, f"the registration of {user_id}")

    async def stream(self, aggregate_type: str, aggregate_id: str, **more: int) -> list[event_store_pb2.EventEnvelope]:
        """The events of an aggregate."""
        request = event_store_pb2.ReadStreamRequest(aggregate_type=aggregate_type, aggregate_id=aggregate_id, **more)
        return [event for answer in await self.collect(self.events.ReadStream, request) for event in answer.events]

    async def line(self, from_position: int = 0, events_max: int = 0) -> list[event_store_pb2.EventEnvelope]:
        """The events of all tenants, by position. Needs role `reader`."""
        request = event_store_pb2.ReadAllRequest(from_position=from_position, events_max=events_max)
        answers = await self.collect(self.events.ReadAll, request, timeout_s=LINE_TIMEOUT_S)
        return [event for answer in answers for event in answer.events]


async def _until(ended: Callable[[], Awaitable[T | None]], deadline_s: float, what: str) -> T:
    """What `ended` returns once that is not None."""
    give_up_at = time.monotonic() + deadline_s
    while True:
        found = await ended()
        if found is not None:
            return found
        if time.monotonic() > give_up_at:
            raise NotEnded(f"{what} has not ended within {deadline_s:.0f} s")
        await asyncio.sleep(ASK_AGAIN_S)

"""A caller of the bank's public API, as the scenarios use it."""

from __future__ import annotations

import asyncio
import time
from uuid import uuid4

import grpc
import grpc.aio
from google.rpc import error_details_pb2
from grpc_status import rpc_status

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
from foldline.v1 import command_pb2, event_store_pb2, event_store_pb2_grpc
from shared.rpc.client import bearer

CALL_TIMEOUT_S = 10.0
ENDS_WITHIN_S = 30.0
MAY_RETRY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED)


class Wrong(Exception):
    """A scenario saw something else than it should have."""


def fresh_options() -> command_pb2.CommandOptions:
    """What begins every command: a new id."""
    return command_pb2.CommandOptions(command_id=str(uuid4()))


def refusal(error: grpc.aio.AioRpcError) -> error_details_pb2.ErrorInfo:
    """Why a call was refused: the ErrorInfo of its status, empty if there is none."""
    info = error_details_pb2.ErrorInfo()
    status = rpc_status.from_call(error)
    for detail in status.details if status else ():
        if detail.Unpack(info):
            break
    return info


class Bank:
    """One caller of the public API: stubs and a token."""

    def __init__(self, write: grpc.aio.Channel, read: grpc.aio.Channel, token: str) -> None:
        self.who = bearer(token)
        self.people = person_pb2_grpc.PersonServiceStub(write)
        self.accounts = account_pb2_grpc.AccountServiceStub(write)
        self.events = event_store_pb2_grpc.EventStoreServiceStub(write)
        self.person_queries = person_query_pb2_grpc.PersonQueryServiceStub(read)
        self.account_queries = account_query_pb2_grpc.AccountQueryServiceStub(read)
        self.transfers = transfer_pb2_grpc.TransferServiceStub(write)
        self.transfer_queries = transfer_query_pb2_grpc.TransferQueryServiceStub(read)
        self.users = user_pb2_grpc.UserServiceStub(write)
        self.user_queries = user_query_pb2_grpc.UserQueryServiceStub(read)

    async def register(self, name: str) -> tuple[str, command_pb2.CommandReceipt]:
        """Registers a person; returns the id and the receipt."""
        person_id = str(uuid4())
        request = person_pb2.RegisterPersonRequest(options=fresh_options(), person_id=person_id, name=name)
        return person_id, await self.people.RegisterPerson(request, metadata=self.who, timeout=CALL_TIMEOUT_S)

    async def open_account(self, owner_id: str, name: str) -> str:
        """Opens an account in dollars; returns its id."""
        account_id = str(uuid4())
        request = account_pb2.OpenAccountRequest(
            options=fresh_options(), account_id=account_id, owner_id=owner_id, currency="USD", name=name
        )
        await self.accounts.OpenAccount(request, metadata=self.who, timeout=CALL_TIMEOUT_S)
        return account_id

    async def deposit(self, account_id: str, amount_minor: int) -> command_pb2.CommandReceipt:
        """Puts money on an account."""
        request = account_pb2.DepositMoneyRequest(
            options=fresh_options(), account_id=account_id, amount_minor=amount_minor, currency="USD"
        )
        return await self.accounts.DepositMoney(request, metadata=self.who, timeout=CALL_TIMEOUT_S)

    async def withdraw(self, account_id: str, amount_minor: int) -> command_pb2.CommandReceipt:
        """Takes money from an account."""
        request = account_pb2.WithdrawMoneyRequest(
            options=fresh_options(), account_id=account_id, amount_minor=amount_minor, currency="USD"
        )
        return await self.accounts.WithdrawMoney(request, metadata=self.who, timeout=CALL_TIMEOUT_S)

    async def freeze(self, account_id: str) -> command_pb2.CommandReceipt:
        """Lets no money move on an account."""
        request = account_pb2.FreezeAccountRequest(options=fresh_options(), account_id=account_id)
        return await self.accounts.FreezeAccount(request, metadata=self.who, timeout=CALL_TIMEOUT_S)

    async def close(self, account_id: str) -> command_pb2.CommandReceipt:
        """Closes an empty account."""
        request = account_pb2.CloseAccountRequest(options=fresh_options(), account_id=account_id)
        return await self.accounts.CloseAccount(request, metadata=self.who, timeout=CALL_TIMEOUT_S)

    async def start_transfer(self, source: str, target: str, amount_minor: int) -> str:
        """Starts a transfer in dollars; returns its id."""
        transfer_id = str(uuid4())
        request = transfer_pb2.StartTransferRequest(
            options=fresh_options(),
            transfer_id=transfer_id,
            from_account_id=source,
            to_account_id=target,
            amount_minor=amount_minor,
            currency="USD",
        )
        await self.transfers.StartTransfer(request, metadata=self.who, timeout=CALL_TIMEOUT_S)
        return transfer_id

    async def ended_transfer(self, transfer_id: str) -> transfer_query_pb2.TransferSummary:
        """The transfer's summary when it has ended; raises Wrong if it does not."""
        request = transfer_query_pb2.GetTransferRequest(transfer_id=transfer_id)
        give_up_at = time.monotonic() + ENDS_WITHIN_S
        while time.monotonic() < give_up_at:
            try:
                answer = await self.transfer_queries.GetTransfer(request, metadata=self.who, timeout=CALL_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.NOT_FOUND:
                    raise
            else:
                if answer.transfer.status != transfer_query_pb2.TRANSFER_STATUS_STARTED:
                    return answer.transfer
            await asyncio.sleep(0.02)
        raise Wrong(f"the transfer {transfer_id} has not ended within {ENDS_WITHIN_S:.0f} s")

    async def register_user(self, login: str, password: str) -> user_query_pb2.UserSummary:
        """Registers a user; returns the summary when the registration has ended. Raises Wrong if it does not."""
        user_id = str(uuid4())
        start = user_pb2.StartUserRegistrationRequest(
            options=fresh_options(), user_id=user_id, login=login, email="somebody@example.com", password=password
        )
        receipt = await self.users.StartUserRegistration(start, metadata=self.who, timeout=ENDS_WITHIN_S)
        ask = user_query_pb2.GetUserRequest(user_id=user_id, consistency_token=receipt.consistency_token)
        give_up_at = time.monotonic() + ENDS_WITHIN_S
        while time.monotonic() < give_up_at:
            user = (await self.user_queries.GetUser(ask, metadata=self.who, timeout=CALL_TIMEOUT_S)).user
            if user.status != user_query_pb2.REGISTRATION_STATUS_STARTED:
                return user
            await asyncio.sleep(0.2)
        raise Wrong(f"the registration of {user_id} has not ended within {ENDS_WITHIN_S:.0f} s")

    async def person(self, person_id: str, token: str) -> person_query_pb2.PersonSummary:
        """A person's summary, not older than the token."""
        request = person_query_pb2.GetPersonRequest(person_id=person_id, consistency_token=token)
        return (await self.person_queries.GetPerson(request, metadata=self.who, timeout=CALL_TIMEOUT_S)).person

    async def account(self, account_id: str, token: str) -> account_query_pb2.AccountSummary:
        """An account's summary, not older than the token."""
        request = account_query_pb2.GetAccountRequest(account_id=account_id, consistency_token=token)
        return (await self.account_queries.GetAccount(request, metadata=self.who, timeout=CALL_TIMEOUT_S)).account

    async def stream(self, aggregate_type: str, aggregate_id: str) -> list[event_store_pb2.EventEnvelope]:
        """All events of an aggregate."""
        request = event_store_pb2.ReadStreamRequest(aggregate_type=aggregate_type, aggregate_id=aggregate_id)
        call = self.events.ReadStream(request, metadata=self.who, timeout=CALL_TIMEOUT_S)
        return [event async for answer in call for event in answer.events]

    async def line(self) -> list[event_store_pb2.EventEnvelope]:
        """All events of the shard, by position. Needs role `reader`."""
        call = self.events.ReadAll(event_store_pb2.ReadAllRequest(), metadata=self.who, timeout=60)
        return [event async for answer in call for event in answer.events]

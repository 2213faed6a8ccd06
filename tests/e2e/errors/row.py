"""What a row of the error table is, and what rows of several services need."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from bank.v1 import account_pb2, account_query_pb2, person_pb2
from foldline.v1 import command_pb2
from tests.e2e.scene import Place, Scene
from tests.support.clients.bank import (
    packed,
    query,
)
from tests.support.system.sealing import token_with

MessageT = TypeVar("MessageT", bound=Message)

INT64_MAX = 2**63 - 1
MEBIBYTE = 1024 * 1024
NO_ID = "00000000-0000-0000-0000-000000000000"
TOMORROW = Timestamp(seconds=4_000_000_000)
BEYOND = Timestamp(seconds=253_402_300_800)

DEPOSIT = "bank.v1.AccountService/DepositMoney"
SEND_BATCH = "foldline.v1.CommandService/SendBatch"
GET_ACCOUNT = "bank.v1.AccountQueryService/GetAccount"


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    situation: str
    call: Callable[[Scene, Place], Awaitable[object]]
    code: str
    # Empty: gRPC itself answers.
    reason: str
    fields: tuple[str, ...] = ()
    waiting_helps: bool = False


def bad(situation: str, call: Callable[[Scene, Place], Awaitable[object]], *fields: str) -> Row:
    """A row of what breaks the rules of fields."""
    return Row(situation, call, "INVALID_ARGUMENT", "INVALID_REQUEST", fields)


def newer(message: MessageT) -> MessageT:
    """The message with a field that only a later release knows, number 999."""
    return type(message).FromString(message.SerializeToString() + b"\xb8\x3e\x01")


async def watch(scene: Scene, name: str, rpc: str, **fields: Any) -> object:
    """The first answer of a Watch RPC of a summary, or how it was refused."""
    method, request = query(scene.bank, name, rpc)
    return await method(request(**fields), metadata=scene.bank.who, timeout=20).read()


def token_of(scene: Scene, place: Place, **changes: Any) -> str:
    """A real consistency token with something changed in it."""
    return token_with(scene.stack.seal_keys, place.tenant, place.consistency_token, **changes)


async def schedule(scene: Scene, command: Message | None, *, due_at: Timestamp | None = TOMORROW) -> object:
    """Asks for a command tomorrow, or at another time."""
    request = command_pb2.ScheduleRequest(command=packed(command) if command else None, due_at=due_at)
    return await scene.bank.call(scene.bank.commands.Schedule, request)


def without_options(place: Place) -> person_pb2.RenamePersonRequest:
    """A command without an id."""
    return person_pb2.RenamePersonRequest(person_id=place.alice, name="Bob")


def with_options(place: Place, given: command_pb2.CommandOptions) -> account_pb2.FreezeAccountRequest:
    """A command with the options given."""
    return account_pb2.FreezeAccountRequest(options=given, account_id=place.blue)


def get_account(place: Place, token: str) -> account_query_pb2.GetAccountRequest:
    """A query of an account with a consistency token."""
    return account_query_pb2.GetAccountRequest(account_id=place.blue, consistency_token=token)

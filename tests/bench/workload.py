"""The requests that are sent and the rows that come of them: the same for Foldline and for its ceilings.

A request is serialized once and differs only in its command ids, which are cut in as text. So the load generator does
next to nothing besides gRPC, for Foldline and for the echo alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count, cycle
from random import Random
from uuid import UUID

from google.protobuf.any_pb2 import Any as Packed
from google.protobuf.message import Message
from uuid_utils.compat import uuid7

from bank.v1 import account_pb2, person_pb2
from foldline.v1 import command_pb2, event_store_pb2

TENANT = "bench"
USER = "load"
CURRENCY = "USD"
PLACEHOLDER = "00000000-0000-4000-8000-000000000000"
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

DEPOSIT = "/bank.v1.AccountService/DepositMoney"
SEND_BATCH = "/foldline.v1.CommandService/SendBatch"
SEND_STREAM = "/foldline.v1.CommandService/SendStream"


def names(kind: str, how_many: int) -> list[str]:
    """The ids of the people or accounts of the workload, the same in every process."""
    return [str(UUID(bytes=hashlib.sha256(f"{kind} {n}".encode()).digest()[:16], version=4)) for n in range(how_many)]


class Ids:
    """Random UUIDs as text, at a third of the price of `uuid4`."""

    def __init__(self) -> None:
        self._bits = Random().getrandbits

    def __call__(self) -> bytes:
        digits = f"{self._bits(128):032x}"
        return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-8{digits[17:20]}-{digits[20:]}".encode()


class Template:
    """A serialized request with a fresh id wherever the placeholder stands."""

    def __init__(self, message: Message) -> None:
        self._parts = message.SerializeToString(deterministic=True).split(PLACEHOLDER.encode())
        self.commands = len(self._parts) - 1

    def fill(self, ids: Ids) -> bytes:
        """The request's bytes, never the same twice."""
        parts = self._parts
        if len(parts) == 2:
            return parts[0] + ids() + parts[1]
        out = [parts[0]]
        for part in parts[1:]:
            out.append(ids())
            out.append(part)
        return b"".join(out)


def deposit(account_id: str) -> account_pb2.DepositMoneyRequest:
    """One cent more on an account."""
    options = command_pb2.CommandOptions(command_id=PLACEHOLDER)
    return account_pb2.DepositMoneyRequest(options=options, account_id=account_id, amount_minor=1, currency=CURRENCY)


def register(person_id: str) -> person_pb2.RegisterPersonRequest:
    """A new person."""
    options = command_pb2.CommandOptions(command_id=PLACEHOLDER)
    return person_pb2.RegisterPersonRequest(options=options, person_id=person_id, name="Alice O'Wonderland")


def open_account(account_id: str, owner_id: str) -> account_pb2.OpenAccountRequest:
    """A new account."""
    options = command_pb2.CommandOptions(command_id=PLACEHOLDER)
    return account_pb2.OpenAccountRequest(
        options=options, account_id=account_id, owner_id=owner_id, currency=CURRENCY, name="blue"
    )


def batch_item(request: Message) -> command_pb2.BatchItem:
    """A request as an item of SendBatch or SendStream."""
    packed = Packed()
    packed.Pack(request, deterministic=True)
    return command_pb2.BatchItem(command=packed)


def batches(requests: Sequence[Message], size: int) -> Iterator[command_pb2.SendBatchRequest]:
    """The requests in batches."""
    for begin in range(0, len(requests), size):
        yield command_pb2.SendBatchRequest(items=[batch_item(request) for request in requests[begin : begin + size]])


def templates(kind: str, accounts: int, batch: int) -> list[Template]:
    """What one kind of load sends, round and round: `unary`, `batch` or `stream`, over so many accounts."""
    requests = [deposit(account_id) for account_id in names("account", accounts)]
    match kind:
        case "unary":
            return [Template(request) for request in requests]
        case "stream":
            return [Template(command_pb2.SendStreamRequest(item=batch_item(request))) for request in requests]
        case "batch":
            # Whole batches, each with other accounts, as often as it takes to come round.
            many = [request for request, _ in zip(cycle(requests), range(max(accounts, 8 * batch)), strict=False)]
            return [Template(request) for request in batches(many, batch) if len(request.items) == batch]
    raise ValueError(kind)


@dataclass(frozen=True, slots=True)
class BareRow:
    """What one deposit leaves in the tables, ready to be written: an event and a command of the log."""

    position: int
    event_id: UUID
    account_id: str
    version: int
    event: bytes
    metadata: bytes
    command_id: UUID
    fingerprint: bytes
    command: bytes
    now: datetime


def bare_rows(accounts: int, first_position: int, first_version: int) -> Iterator[BareRow]:
    """The rows of deposits, one after another over the accounts; the same bytes in the same columns as Foldline's."""
    ids, owners = Ids(), names("person", accounts)
    accounts_ids = names("account", accounts)
    for n in count():
        nth = n % accounts
        version = first_version + n // accounts
        account_id, command_id = accounts_ids[nth], ids().decode()
        event = account_pb2.MoneyDeposited(
            account_id=account_id, owner_id=owners[nth], amount_minor=1, currency=CURRENCY, balance_after_minor=version
        )
        metadata = event_store_pb2.EventMetadata(
            command_id=command_id, correlation_id=command_id, user_id=USER, traceparent=TRACEPARENT
        )
        request = deposit(account_id)
        request.ClearField("options")
        command = request.SerializeToString(deterministic=True)
        yield BareRow(
            position=first_position + n,
            event_id=uuid7(),
            account_id=account_id,
            version=version,
            event=event.SerializeToString(deterministic=True),
            metadata=metadata.SerializeToString(),
            command_id=UUID(command_id),
            fingerprint=hashlib.sha256(command_id.encode() + command).digest(),
            command=command,
            now=datetime.now(UTC),
        )

"""Rows of commands: of what is not there, against a rule, packed, too large."""

from __future__ import annotations

from google.protobuf.any_pb2 import Any as Packed
from google.protobuf.timestamp_pb2 import Timestamp

from bank.v1 import account_pb2
from foldline.v1 import command_pb2
from shared.platform.identity import Role
from tests.e2e.errors.row import (
    INT64_MAX,
    MEBIBYTE,
    SEND_BATCH,
    Row,
    bad,
)
from tests.e2e.scene import BALANCE_MINOR, NIL
from tests.support.clients.bank import (
    deposit,
    freeze,
    item,
    open_account,
    packed,
    rename,
)

ABSENT = [
    Row("deposit: unknown account", lambda s, p: s.bank.deposit(NIL, 1), "NOT_FOUND", "ACCOUNT_NOT_FOUND"),
    Row("deposit: another tenant's account", lambda s, p: s.bank.deposit(p.theirs, 1), "NOT_FOUND", "ACCOUNT_NOT_FOUND"),
    Row("withdraw: unknown account", lambda s, p: s.bank.withdraw(NIL, 1), "NOT_FOUND", "ACCOUNT_NOT_FOUND"),
    Row("freeze: unknown account", lambda s, p: s.bank.freeze(NIL), "NOT_FOUND", "ACCOUNT_NOT_FOUND"),
    Row("unfreeze: unknown account", lambda s, p: s.bank.unfreeze(NIL), "NOT_FOUND", "ACCOUNT_NOT_FOUND"),
    Row("a person's id is no account's", lambda s, p: s.bank.freeze(p.alice), "NOT_FOUND", "ACCOUNT_NOT_FOUND"),
    Row("rename: unknown person", lambda s, p: s.bank.rename(NIL, "Bob"), "NOT_FOUND", "PERSON_NOT_FOUND"),
    Row("rename: another tenant's", lambda s, p: s.bank.rename(p.foreigner, "Bob"), "NOT_FOUND", "PERSON_NOT_FOUND"),
    Row("close a person: unknown", lambda s, p: s.bank.close_person(NIL), "NOT_FOUND", "PERSON_NOT_FOUND"),
    Row("close a person: another tenant's", lambda s, p: s.bank.close_person(p.foreigner), "NOT_FOUND", "PERSON_NOT_FOUND"),
    Row("deactivate: unknown user", lambda s, p: s.bank.deactivate(NIL), "NOT_FOUND", "USER_NOT_FOUND"),
    Row("e-mail: unknown user", lambda s, p: s.bank.change_email(NIL, "a@example.com"), "NOT_FOUND", "USER_NOT_FOUND"),
    Row("roles: unknown user", lambda s, p: s.bank.change_roles(NIL, "user"), "NOT_FOUND", "USER_NOT_FOUND"),
    Row("roles: a person is no user", lambda s, p: s.bank.change_roles(p.alice, "user"), "NOT_FOUND", "USER_NOT_FOUND"),
    Row("open: unknown owner", lambda s, p: s.bank.open(NIL), "NOT_FOUND", "PERSON_NOT_FOUND"),
    Row("open: another tenant's person", lambda s, p: s.bank.open(p.foreigner), "NOT_FOUND", "PERSON_NOT_FOUND"),
    Row("look up: unknown command", lambda s, p: s.bank.command(NIL), "NOT_FOUND", "COMMAND_NOT_FOUND"),
    Row("look up: another tenant's", lambda s, p: s.bank.command(p.their_command), "NOT_FOUND", "COMMAND_NOT_FOUND"),
    Row("stream: unknown aggregate", lambda s, p: s.read_stream("account", NIL), "NOT_FOUND", "STREAM_NOT_FOUND"),
    Row("stream: another tenant's", lambda s, p: s.read_stream("account", p.theirs), "NOT_FOUND", "STREAM_NOT_FOUND"),
    Row("stream: unknown type", lambda s, p: s.read_stream("zebra", p.blue), "NOT_FOUND", "STREAM_NOT_FOUND"),
    Row(
        "stream: beyond its end",
        lambda s, p: s.read_stream("account", p.blue, from_version=INT64_MAX),
        "NOT_FOUND",
        "STREAM_NOT_FOUND",
    ),
    Row("describe: unknown aggregate", lambda s, p: s.describe("account", NIL), "NOT_FOUND", "AGGREGATE_NOT_FOUND"),
    Row("describe: another tenant's", lambda s, p: s.describe("account", p.theirs), "NOT_FOUND", "AGGREGATE_NOT_FOUND"),
    Row("describe: unknown type", lambda s, p: s.describe("zebra", p.blue), "NOT_FOUND", "AGGREGATE_NOT_FOUND"),
    Row("history: another tenant's", lambda s, p: s.state("person", p.foreigner), "NOT_FOUND", "AGGREGATE_NOT_FOUND"),
    Row(
        "history: beyond the last version",
        lambda s, p: s.state("account", p.blue, version=INT64_MAX),
        "NOT_FOUND",
        "VERSION_NOT_FOUND",
    ),
    Row(
        "history: before there was any event",
        lambda s, p: s.state("account", p.blue, moment=Timestamp(seconds=1)),
        "NOT_FOUND",
        "VERSION_NOT_FOUND",
    ),
    Row("diff: another tenant's", lambda s, p: s.diff("account", p.theirs, 1, 2), "NOT_FOUND", "AGGREGATE_NOT_FOUND"),
    Row("diff: beyond the last version", lambda s, p: s.diff("account", p.blue, 1, 3), "NOT_FOUND", "VERSION_NOT_FOUND"),
    Row("box: unknown aggregate", lambda s, p: s.box("account", NIL), "NOT_FOUND", "AGGREGATE_NOT_FOUND"),
    Row("box: unknown type", lambda s, p: s.box("zebra", NIL), "NOT_FOUND", "AGGREGATE_NOT_FOUND"),
    Row("box: another tenant's", lambda s, p: s.box("account", p.theirs), "NOT_FOUND", "AGGREGATE_NOT_FOUND"),
    Row("retention: unknown type", lambda s, p: s.set_retention("zebra", 1), "NOT_FOUND", "AGGREGATE_TYPE_NOT_FOUND"),
    Row(
        "retention plan: unknown type",
        lambda s, p: s.plan_retention(aggregate_type="zebra"),
        "NOT_FOUND",
        "AGGREGATE_TYPE_NOT_FOUND",
    ),
    Row("tenant: nobody's", lambda s, p: s.tenants("DescribeTenant", "no-such"), "NOT_FOUND", "TENANT_NOT_FOUND"),
    Row("export: nobody's", lambda s, p: s.tenants("ExportTenant", "no-such"), "NOT_FOUND", "TENANT_NOT_FOUND"),
    Row(
        "purge: nobody's",
        lambda s, p: s.tenants("PurgeTenant", "no-such", confirmed_tenant="no-such"),
        "NOT_FOUND",
        "TENANT_NOT_FOUND",
    ),
    Row("purge: none", lambda s, p: s.tenants("GetTenantPurge", p.tenant), "NOT_FOUND", "TENANT_PURGE_NOT_FOUND"),
    Row("unbox: unknown aggregate", lambda s, p: s.unbox("account", NIL), "NOT_FOUND", "AGGREGATE_NOT_FOUND"),
    Row("unbox: another tenant's", lambda s, p: s.unbox("account", p.theirs), "NOT_FOUND", "AGGREGATE_NOT_FOUND"),
    Row("verify: no box", lambda s, p: s.verify_box("account", p.blue, 0), "NOT_FOUND", "BOX_NOT_FOUND"),
    Row("verify: another tenant's", lambda s, p: s.verify_box("account", p.theirs, 0), "NOT_FOUND", "BOX_NOT_FOUND"),
    Row("line: unknown shard", lambda s, p: s.read_all(s.by(Role.READER), shard=7), "NOT_FOUND", "SHARD_NOT_FOUND"),
    Row("query: unknown person", lambda s, p: s.bank.person(NIL), "NOT_FOUND", "PERSON_NOT_FOUND"),
    Row("query: another tenant's person", lambda s, p: s.bank.person(p.foreigner), "NOT_FOUND", "PERSON_NOT_FOUND"),
    Row("query: unknown account", lambda s, p: s.bank.account(NIL), "NOT_FOUND", "ACCOUNT_NOT_FOUND"),
    Row("query: another tenant's account", lambda s, p: s.bank.account(p.theirs), "NOT_FOUND", "ACCOUNT_NOT_FOUND"),
    Row("statement: unknown account", lambda s, p: s.movements(account_id=NIL), "NOT_FOUND", "ACCOUNT_NOT_FOUND"),
    Row("statement: another tenant's", lambda s, p: s.movements(account_id=p.theirs), "NOT_FOUND", "ACCOUNT_NOT_FOUND"),
]

AGAINST_A_RULE = [
    Row("register twice", lambda s, p: s.bank.register("A", p.alice), "ALREADY_EXISTS", "PERSON_ALREADY_REGISTERED"),
    Row(
        "open twice",
        lambda s, p: s.bank.call(s.bank.accounts.OpenAccount, open_account(p.blue, p.alice)),
        "ALREADY_EXISTS",
        "ACCOUNT_ALREADY_OPEN",
    ),
    Row("close who holds money", lambda s, p: s.bank.close_person(p.alice), "FAILED_PRECONDITION", "PERSON_HOLDS_MONEY"),
    Row("rename who is closed", lambda s, p: s.bank.rename(p.gone, "Bob"), "FAILED_PRECONDITION", "PERSON_CLOSED"),
    Row("open for who is closed", lambda s, p: s.bank.open(p.gone), "FAILED_PRECONDITION", "PERSON_CLOSED"),
    Row("register who is closed", lambda s, p: s.bank.register("A", p.gone), "ALREADY_EXISTS", "PERSON_ALREADY_REGISTERED"),
    Row("unbox what is not boxed", lambda s, p: s.unbox("account", p.blue), "FAILED_PRECONDITION", "AGGREGATE_NOT_BOXED"),
    Row("box a login", lambda s, p: s.box("login", NIL), "FAILED_PRECONDITION", "NEVER_BOXED"),
    Row("retention of logins", lambda s, p: s.set_retention("login", 1), "FAILED_PRECONDITION", "NEVER_BOXED"),
    Row("purge of accounts alone", lambda s, p: s.set_retention("account", 1, purge=1), "FAILED_PRECONDITION", "NEVER_PURGED"),
    Row("purge of transfers", lambda s, p: s.set_retention("transfer", 0, purge=1), "FAILED_PRECONDITION", "NEVER_PURGED"),
    Row(
        "plan of a purge of rules",
        lambda s, p: s.plan_retention(aggregate_type="retention", purge_after_days=1),
        "FAILED_PRECONDITION",
        "NEVER_PURGED",
    ),
    Row("box the switches", lambda s, p: s.box("overrides", "overrides"), "FAILED_PRECONDITION", "NEVER_BOXED"),
    Row(
        "box at a stale version",
        lambda s, p: s.box("account", p.blue, expected_version=1),
        "ABORTED",
        "VERSION_MISMATCH",
    ),
    Row(
        "box with a used command id",
        lambda s, p: s.box("account", p.blue, command_id=p.used_command),
        "INVALID_ARGUMENT",
        "COMMAND_ID_REUSED",
    ),
    Row(
        "unbox with a used command id",
        lambda s, p: s.unbox("account", p.blue, command_id=p.used_command),
        "INVALID_ARGUMENT",
        "COMMAND_ID_REUSED",
    ),
    Row("withdraw too much", lambda s, p: s.bank.withdraw(p.blue, INT64_MAX), "FAILED_PRECONDITION", "INSUFFICIENT_FUNDS"),
    Row("deposit beyond 64 bits", lambda s, p: s.bank.deposit(p.blue, INT64_MAX), "FAILED_PRECONDITION", "BALANCE_OVERFLOW"),
    Row("deposit on a frozen account", lambda s, p: s.bank.deposit(p.ice, 1), "FAILED_PRECONDITION", "ACCOUNT_FROZEN"),
    Row("withdraw from a frozen account", lambda s, p: s.bank.withdraw(p.ice, 1), "FAILED_PRECONDITION", "ACCOUNT_FROZEN"),
    Row("deposit euros on dollars", lambda s, p: s.bank.deposit(p.blue, 1, "EUR"), "FAILED_PRECONDITION", "CURRENCY_MISMATCH"),
    Row("withdraw yen", lambda s, p: s.bank.withdraw(p.blue, 1, "JPY"), "FAILED_PRECONDITION", "CURRENCY_MISMATCH"),
    Row("a currency of NULs", lambda s, p: s.bank.deposit(p.blue, 1, "\0" * 3), "FAILED_PRECONDITION", "CURRENCY_MISMATCH"),
    Row(
        "stale expected version",
        lambda s, p: s.bank.call(s.bank.accounts.DepositMoney, deposit(p.blue, 1, expected_version=1)),
        "ABORTED",
        "VERSION_MISMATCH",
    ),
    Row(
        "expected version of what is not there",
        lambda s, p: s.bank.call(s.bank.accounts.DepositMoney, deposit(NIL, 1, expected_version=INT64_MAX)),
        "ABORTED",
        "VERSION_MISMATCH",
    ),
    Row(
        "command id used with another amount",
        lambda s, p: s.bank.call(s.bank.accounts.DepositMoney, deposit(p.blue, 2, command_id=p.used_command)),
        "INVALID_ARGUMENT",
        "COMMAND_ID_REUSED",
    ),
    Row(
        "command id used for another command",
        lambda s, p: s.bank.call(s.bank.accounts.FreezeAccount, freeze(p.blue, command_id=p.used_command)),
        "INVALID_ARGUMENT",
        "COMMAND_ID_REUSED",
    ),
    Row(
        "command id used by another user",
        lambda s, p: s.by(user_id="bob").call(
            s.bank.accounts.DepositMoney, deposit(p.blue, BALANCE_MINOR, command_id=p.used_command)
        ),
        "INVALID_ARGUMENT",
        "COMMAND_ID_REUSED",
    ),
]

PACKED = [
    bad("Send: no command", lambda s, p: s.send(command_pb2.SendRequest()), "command"),
    Row(
        "Send: an empty Any",
        lambda s, p: s.send(command_pb2.SendRequest(command=Packed())),
        "INVALID_ARGUMENT",
        "UNKNOWN_COMMAND",
        ("command.type_url",),
    ),
    Row(
        "Send: an unknown type",
        lambda s, p: s.send(command_pb2.SendRequest(command=Packed(type_url="type.googleapis.com/bank.v1.RobBank"))),
        "INVALID_ARGUMENT",
        "UNKNOWN_COMMAND",
        ("command.type_url",),
    ),
    Row(
        "Send: an event is no command",
        lambda s, p: s.send(command_pb2.SendRequest(command=packed(account_pb2.MoneyDeposited(account_id=p.blue)))),
        "INVALID_ARGUMENT",
        "UNKNOWN_COMMAND",
        ("command.type_url",),
    ),
    Row(
        "Send: malformed inside",
        lambda s, p: s.send(
            command_pb2.SendRequest(command=Packed(type_url="type.googleapis.com/bank.v1.DepositMoneyRequest", value=b"\xff\xff"))
        ),
        "INVALID_ARGUMENT",
        "MALFORMED_MESSAGE",
        ("command.value",),
    ),
    bad(
        "Send: a bad field inside",
        lambda s, p: s.send(command_pb2.SendRequest(command=packed(deposit(p.blue, 0)))),
        "command.amount_minor",
    ),
    bad("SendBatch: empty", lambda s, p: s.bank.batch(), "items"),
    bad("SendBatch: 257 items", lambda s, p: s.bank.batch(*[item(freeze(p.blue))] * 257), "items"),
    bad("SendBatch: an item without command", lambda s, p: s.bank.batch(command_pb2.BatchItem()), "items[0].command"),
    bad(
        "SendBatch: a tenant that is none",
        lambda s, p: s.by(Role.PROCESS).batch(item(freeze(p.blue)), item(freeze(p.blue), tenant="Not A Tenant")),
        "items[1].tenant",
    ),
    bad(
        "SendBatch: a causation id that is no UUID",
        lambda s, p: s.by(Role.PROCESS).batch(item(freeze(p.blue), causation_id="1")),
        "items[0].causation_id",
    ),
    bad(
        "SendBatch: a user with NUL in the name",
        lambda s, p: s.by(Role.PROCESS).batch(item(freeze(p.blue), on_behalf_of="bo\0b")),
        "items[0].on_behalf_of",
    ),
    bad("SendStream: no item", lambda s, p: s.stream(command_pb2.BatchItem()), "item.command"),
    bad(
        "SendStream: a user with NUL in the name",
        lambda s, p: s.stream(item(freeze(p.blue), on_behalf_of="\0"), bank=s.by(Role.PROCESS)),
        "item.on_behalf_of",
    ),
]

TOO_MUCH = [
    Row(
        "a command of more than 64 KiB",
        lambda s, p: s.bank.rename(p.alice, "x" * 64 * 1024),
        "RESOURCE_EXHAUSTED",
        "MESSAGE_TOO_LARGE",
    ),
    Row(
        "a packed command of more than 64 KiB",
        lambda s, p: s.send(command_pb2.SendRequest(command=packed(rename(p.alice, "x" * 64 * 1024)))),
        "RESOURCE_EXHAUSTED",
        "MESSAGE_TOO_LARGE",
    ),
    Row(
        "a streamed command of 2 MiB",
        lambda s, p: s.stream(item(rename(p.alice, "x" * 2 * MEBIBYTE))),
        "RESOURCE_EXHAUSTED",
        "MESSAGE_TOO_LARGE",
    ),
    bad("2,000,000 empty items", lambda s, p: s.raw(SEND_BATCH, b"\n\0" * 2_000_000), "items"),
    Row(
        "a query of 2 MiB",
        lambda s, p: s.bank.account("x" * 2 * MEBIBYTE),
        "RESOURCE_EXHAUSTED",
        "MESSAGE_TOO_LARGE",
    ),
    Row(
        "a batch of a little over 4 MiB",
        lambda s, p: s.bank.batch(*[item(rename(p.alice, "x" * (MEBIBYTE // 2)))] * 8),
        "RESOURCE_EXHAUSTED",
        "MESSAGE_TOO_LARGE",
    ),
    Row("a batch of 6 MiB: gRPC itself refuses", lambda s, p: s.raw(SEND_BATCH, b"x" * 6 * MEBIBYTE), "RESOURCE_EXHAUSTED", ""),
]

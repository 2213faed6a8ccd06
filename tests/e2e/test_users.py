"""Users: logins that are unique under any race, and passwords that nobody ever sees again."""

from __future__ import annotations

import asyncio
import base64
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nats
import psycopg
import pytest
from psycopg import sql

from bank.v1 import user_pb2, user_query_pb2
from deploy.bootstrap import Database
from foldline.v1 import command_pb2
from shared.folds.ids import step_id
from shared.line.broker import stream_name
from shared.platform.identity import Role
from tests.e2e.conftest import Caller, ProcessAdmin
from tests.support.clients.bank import Bank, Refused, item, new_id, packed, read_status, refused, register, start_registration
from tests.support.system.stack import Stack
from tests.support.system.waiting import eventually

SUCCEEDED = user_query_pb2.REGISTRATION_STATUS_SUCCEEDED
FAILED = user_query_pb2.REGISTRATION_STATUS_FAILED
PASSWORD = "correct horse battery"


def ended(user: user_query_pb2.UserSummary) -> tuple[str, str]:
    """How a registration ended: the status and the reason."""
    return user_query_pb2.RegistrationStatus.Name(user.status).removeprefix("REGISTRATION_STATUS_"), user.reason


# Registration


async def test_the_first_gets_the_login_and_the_second_does_not(bank: Bank) -> None:
    """D: `Succeeded`, then `Failed` with the reason, also if it is written in another way."""
    first = await bank.ended_registration(await bank.register_user("Straße", PASSWORD))
    second = await bank.ended_registration(await bank.register_user("STRASSE", PASSWORD))
    assert (ended(first), ended(second)) == (("SUCCEEDED", ""), ("FAILED", "LOGIN_TAKEN"))
    assert (first.login, second.login, first.email) == ("Straße", "STRASSE", "somebody@example.com")
    assert first.started_at.ToNanoseconds() < first.ended_at.ToNanoseconds()


async def test_the_same_login_in_another_tenant(caller: Caller, bank: Bank) -> None:
    """Succeeds: each tenant has its own logins, and lists its own users alone."""
    other = caller(tenant=f"other-{new_id()[:8]}")
    here = await bank.ended_registration(await bank.register_user("alice", PASSWORD))
    there = await other.ended_registration(await other.register_user("alice", PASSWORD))
    assert (here.status, there.status) == (SUCCEEDED, SUCCEEDED)
    assert (await refused(other.user(here.user_id))).reason == "USER_NOT_FOUND"
    listed = await other.call(other.user_queries.ListUsers, user_query_pb2.ListUsersRequest())
    assert [user.user_id for user in listed.users] == [there.user_id]


async def test_of_many_at_once_exactly_one_succeeds(bank: Bank) -> None:
    """Twenty want one login, in twenty ways of writing it; all end, and the list shows it, page by page."""
    ways = [f"{'H' if nth % 2 else 'h'}{'u' if nth % 3 else 'U'}mpt{'y' if nth % 5 else 'Y'}" for nth in range(20)]
    started = await asyncio.gather(*[bank.register_user(way, PASSWORD) for way in ways])
    users = await asyncio.gather(*[bank.ended_registration(one) for one in started])
    assert Counter(map(ended, users)) == {("SUCCEEDED", ""): 1, ("FAILED", "LOGIN_TAKEN"): 19}

    only = user_query_pb2.UserFilter(status=FAILED)
    found: list[user_query_pb2.UserSummary] = []
    sizes: list[int] = []
    token = ""
    while token or not sizes:
        request = user_query_pb2.ListUsersRequest(page_size=8, page_token=token, filter=only, order_by="started_at desc")
        page = await bank.call(bank.user_queries.ListUsers, request)
        found, sizes, token = [*found, *page.users], [*sizes, len(page.users)], page.next_page_token
    assert sizes == [8, 8, 3]
    assert {user.user_id for user in found} == {user.user_id for user in users if user.status == FAILED}
    moments = [user.started_at.ToNanoseconds() for user in found]
    assert moments == sorted(moments, reverse=True)


async def test_a_registrations_commands_have_the_ids_that_its_first_event_fixed(
    desk: ProcessAdmin, bank: Bank, tenant: str
) -> None:
    """And an operator sees them all, with their answers; nothing of it names the login or the e-mail."""
    user_id, receipt = await bank.register_user("Tweedle", PASSWORD)
    told = await desk.ended(tenant, "registration", user_id)
    [first, last] = await bank.stream("user", user_id)
    started = user_pb2.UserRegistrationStarted.FromString(first.payload)
    assert [(entry.kind, entry.step, entry.id, entry.phase) for entry in told.history] == [
        ("event", "", first.event_id, "reserving"),
        ("command", "reserve", started.reserve_command_id, "reserving"),
        ("answer", "reserve", started.reserve_command_id, "holding"),
        ("command", "hold", started.hold_command_id, "holding"),
        ("answer", "hold", started.hold_command_id, "confirming"),
        ("command", "confirm", started.confirm_command_id, "confirming"),
        ("answer", "confirm", started.confirm_command_id, "succeeded"),
    ]
    assert last.metadata.command_id == started.confirm_command_id == str(step_id("registration", user_id, "confirm"))
    assert (last.metadata.correlation_id, last.metadata.on_behalf_of) == (receipt.command_id, "alice")
    assert "Tweedle" not in str(told)
    assert "somebody@example.com" not in str(told)
    assert [event.type for event in await bank.stream("login", started.login_id)] == [
        "bank.v1.LoginReserved",
        "bank.v1.LoginConfirmed",
    ]


async def test_a_repeat_is_answered_as_the_first_time(bank: Bank) -> None:
    """Many at once or later: one registration, one receipt, and the first password stays, also if another comes along."""
    user_id, command_id = new_id(), new_id()

    async def send(password: str) -> command_pb2.CommandReceipt:
        request = start_registration(user_id, "Alice", password, command_id=command_id)
        receipt: command_pb2.CommandReceipt = await bank.call(bank.users.StartUserRegistration, request)
        return receipt

    receipts = await asyncio.gather(*[send(PASSWORD) for _ in range(4)])
    receipts.append(await send(PASSWORD + " and another"))
    assert {(one.command_id, one.version, one.position, one.status) for one in receipts} == {
        (command_id, 1, receipts[0].position, command_pb2.COMMAND_STATUS_COMPLETED)
    }
    await bank.ended_registration((user_id, receipts[0]))
    assert await bank.verify("alice", PASSWORD) == user_id
    assert (await refused(bank.verify("alice", PASSWORD + " and another"))).reason == "LOGIN_REFUSED"
    other = start_registration(user_id, "Bob", PASSWORD, command_id=command_id)
    assert (await refused(bank.call(bank.users.StartUserRegistration, other))).reason == "COMMAND_ID_REUSED"


async def test_a_user_registers_once(bank: Bank) -> None:
    """Under another command id it is refused, whatever login it asks for, and the first password stays."""
    user_id, receipt = await bank.register_user("alice", PASSWORD)
    await bank.ended_registration((user_id, receipt))
    told = await refused(bank.register_user("al ice", PASSWORD + " 2", user_id))
    assert (told.code, told.reason) == ("ALREADY_EXISTS", "USER_ALREADY_REGISTERED")
    assert await bank.verify("alice", PASSWORD) == user_id


@pytest.mark.parametrize("login", ["a b", "alice\0", "al\u202eice", "al\u200dice", "alice\ufe0f", "alice\u0378"])
async def test_a_login_that_nobody_could_tell_from_another_is_refused(bank: Bank, login: str) -> None:
    """With the field that is wrong; and no stream is left of it."""
    user_id = new_id()
    told = await refused(bank.register_user(login, PASSWORD, user_id))
    assert (told.code, told.reason, told.fields) == ("INVALID_ARGUMENT", "LOGIN_NOT_ALLOWED", ("login",))
    assert (await refused(bank.stream("user", user_id))).reason == "STREAM_NOT_FOUND"


@pytest.mark.parametrize(
    ("login", "password", "email", "field"),
    [
        ("alice", "seven77", "a@example.com", "password"),
        ("alice", "a" * 1025, "a@example.com", "password"),
        ("alice", "ä" * 513, "a@example.com", "password"),
        ("", PASSWORD, "a@example.com", "login"),
        ("a" * 101, PASSWORD, "a@example.com", "login"),
        ("alice", PASSWORD, "alice", "email"),
    ],
)
async def test_bad_input(bank: Bank, login: str, password: str, email: str, field: str) -> None:
    """Is refused before anything is done, and names the field, never what was in it."""
    told = await refused(bank.call(bank.users.StartUserRegistration, start_registration(new_id(), login, password, email=email)))
    assert (told.code, told.reason, told.fields) == ("INVALID_ARGUMENT", "INVALID_REQUEST", (field,))
    assert password not in told.text


async def test_a_secret_travels_by_itself(bank: Bank) -> None:
    """In a batch or a stream it is refused, the other items are not; packed by itself it is taken."""
    user_id, person = new_id(), new_id()
    request = start_registration(user_id, "alice", PASSWORD)
    receipts = await bank.batch(item(request), item(register(person, "Alice")))
    told = read_status(receipts[0].error)
    assert (told.code, told.reason) == ("INVALID_ARGUMENT", "NOT_IN_A_BATCH")
    assert receipts[1].status == command_pb2.COMMAND_STATUS_COMPLETED
    stream = bank.commands.SendStream(iter([command_pb2.SendStreamRequest(item=item(request))]), metadata=bank.who, timeout=20)
    assert [read_status(answer.receipt.error).reason async for answer in stream] == ["NOT_IN_A_BATCH"]
    sent = await bank.call(bank.commands.Send, command_pb2.SendRequest(command=packed(request)))
    assert (await bank.ended_registration((user_id, sent.receipt))).status == SUCCEEDED


# The door


async def test_a_password_is_right_or_wrong(caller: Caller, bank: Bank) -> None:
    """Right, it says whose it is, however the login is written; else every caller is told the same."""
    user_id, receipt = await bank.register_user("Alice", PASSWORD)
    await bank.ended_registration((user_id, receipt))
    other = caller(tenant=f"other-{new_id()[:8]}")
    assert await bank.verify("alice", PASSWORD) == user_id
    assert await bank.verify("\uff21LICE", PASSWORD) == user_id
    told = {
        "wrong password": await refused(bank.verify("alice", PASSWORD + "x")),
        "password in capitals": await refused(bank.verify("alice", PASSWORD.upper())),
        "unknown login": await refused(bank.verify("carol", PASSWORD)),
        "a login with a space": await refused(bank.verify("al ice", PASSWORD)),
        "a login nobody can see": await refused(bank.verify("\u200b", PASSWORD)),
        "another tenant": await refused(other.verify("alice", PASSWORD)),
    }
    alike = Refused("UNAUTHENTICATED", "the login or the password is wrong", "LOGIN_REFUSED")
    assert told == dict.fromkeys(told, alike)


async def test_who_failed_to_register_cannot_log_in(bank: Bank) -> None:
    """Its password is not the login's, and the login's holder is not it."""
    first, receipt = await bank.register_user("alice", PASSWORD)
    await bank.ended_registration((first, receipt))
    second = await bank.ended_registration(await bank.register_user("alice", PASSWORD + " of the second"))
    assert second.status == FAILED
    assert (await refused(bank.verify("alice", PASSWORD + " of the second"))).reason == "LOGIN_REFUSED"
    assert await bank.verify("alice", PASSWORD) == first


async def test_who_guesses_is_made_to_wait(bank: Bank) -> None:
    """After ten wrong passwords of a login, with the time to wait; another login of the tenant is open still."""
    user_id, receipt = await bank.register_user("alice", PASSWORD)
    await bank.ended_registration((user_id, receipt))
    for nth in range(9):
        assert (await refused(bank.verify("alice", f"guess number {nth}"))).reason == "LOGIN_REFUSED"
    assert await bank.verify("alice", PASSWORD) == user_id, "which forgives the wrong ones"
    for nth in range(10):
        assert (await refused(bank.verify("alice", f"guess number {nth}"))).reason == "LOGIN_REFUSED"
    told = await refused(bank.verify("ALICE", PASSWORD))
    assert (told.code, told.reason, told.retry_after_s) == ("RESOURCE_EXHAUSTED", "TOO_MANY_TRIES", 60)
    assert (await refused(bank.verify("bob", PASSWORD))).reason == "LOGIN_REFUSED"


@pytest.mark.parametrize("roles", [[Role.USER], [Role.READER]], ids=["user", "reader"])
async def test_who_may_not(caller: Caller, roles: list[Role]) -> None:
    """Users are registered, and their passwords checked, for the tenant's administrators; packed or not."""
    bank = caller(roles=roles)
    request = start_registration(new_id(), "alice", PASSWORD)
    for call in (
        bank.call(bank.users.StartUserRegistration, request),
        bank.verify("alice", PASSWORD),
        bank.call(bank.commands.Send, command_pb2.SendRequest(command=packed(request))),
    ):
        told = await refused(call)
        assert (told.code, told.reason) == ("PERMISSION_DENIED", "ROLE_MISSING")


async def test_only_a_process_ends_a_registration_or_takes_a_login(caller: Caller) -> None:
    """Not even an operator who is the tenant's administrator as well."""
    bank = caller(roles=[Role.USER, Role.TENANT_ADMIN, Role.OPERATOR, Role.READER])
    user_id, login_id = new_id(), new_id()
    receipts = await bank.batch(
        item(_with_options(user_pb2.ConfirmUserRegistrationRequest(user_id=user_id))),
        item(_with_options(user_pb2.FailUserRegistrationRequest(user_id=user_id, reason="NO"))),
        item(_with_options(user_pb2.ReserveLoginRequest(login_id=login_id, user_id=user_id, expires_at_ms=2**60))),
        item(_with_options(user_pb2.ConfirmLoginRequest(login_id=login_id, user_id=user_id))),
        item(_with_options(user_pb2.ReleaseLoginRequest(login_id=login_id, user_id=user_id))),
    )
    told = [read_status(receipt.error) for receipt in receipts]
    assert {(one.code, one.reason, one.facts["roles"]) for one in told} == {("PERMISSION_DENIED", "ROLE_MISSING", "process")}


def _with_options(request: Any) -> Any:
    request.options.command_id = new_id()
    return request


# Secrets


def spellings(secret: str) -> Iterator[bytes]:
    """How a text may stand in a file: as it is, in hexadecimal, in base 64 wherever it begins, in 16 bits."""
    plain = secret.encode()
    yield plain
    yield plain.hex().encode()
    yield secret.encode("utf-16-le")
    for before in range(3):
        # Without the ends, which depend on what stands beside it.
        yield base64.b64encode(b"\0" * before + plain)[4:-4]


def in_tables(database: Database, name: str) -> Iterator[tuple[str, bytes]]:
    """Every table of a database that is not PostgreSQL's own, with all that is in it."""
    with psycopg.connect(database.admin) as connection:
        tables = connection.execute(
            "SELECT schemaname, tablename FROM pg_tables WHERE schemaname NOT IN ('pg_catalog', 'information_schema')"
        ).fetchall()
        assert tables
        for schema, table in tables:
            rows = connection.execute(sql.SQL("SELECT * FROM {}").format(sql.Identifier(schema, table)))
            values = (value for row in rows for value in row)
            yield f"{name}.{table}", b"\n".join(one if isinstance(one, bytes) else str(one).encode() for one in values)


def in_files(folder: Path, name: str) -> Iterator[tuple[str, bytes]]:
    """Every file of a folder."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert files
    for file in files:
        yield f"{name}/{file.name}", file.read_bytes()


def everything(stack: Stack) -> Iterator[tuple[str, bytes]]:
    """All that the system keeps: tables of all databases, logs of all processes and engines, files of the broker's store."""
    databases = stack.databases
    for name, database in (("write", databases.write), ("read", databases.read), ("saga", databases.saga)):
        yield from in_tables(database, name)
    yield from in_files(stack.logs, "logs")
    yield from in_files(stack.nats.folder, "nats")
    yield "postgres.log", stack.postgres.log.read_bytes()


def places(stack: Stack, *secrets: str) -> set[str]:
    """Where any of these stands."""
    wanted = [spelling for secret in secrets for spelling in spellings(secret)]
    return {place.rpartition("/")[0] or place for place, held in everything(stack) if any(one in held for one in wanted)}


async def broker_has(stack: Stack, position: int) -> None:
    """Waits until the broker holds the line to a position."""
    client = await nats.connect(stack.nats.url)
    try:

        async def there() -> bool:
            return (await client.jetstream().stream_info(stream_name(1))).state.last_seq >= position

        await eventually(there, 30, every_s=0.05)
    finally:
        await client.close()


@pytest.mark.timeout(240)
async def test_a_password_and_its_hash_are_in_the_credentials_table_alone(
    shared_stack: Stack, caller: Caller, insider: Bank, desk: ProcessAdmin, tenant: str
) -> None:
    """After registrations that succeeded, failed and were refused in every way, and after checks that were right and wrong.

    The control, which goes the same ways: the login, which is in the events, and so found in tables, and on the broker.
    """
    login, mark = f"Zaphod{new_id().replace('-', '')}", new_id().replace("-", "")
    secrets = [f"Xyzzy{mark}{nth}Plugh" for nth in range(8)]
    right, second, again, same_user, short, batched, packed_one, guess = secrets

    user_id, command_id = new_id(), new_id()
    first = start_registration(user_id, login, right, command_id=command_id)
    receipt = await insider.call(insider.users.StartUserRegistration, first)
    await insider.ended_registration((user_id, receipt))
    failed, failing = await insider.register_user(login.upper(), second)
    assert (await insider.ended_registration((failed, failing))).status == FAILED
    await insider.call(insider.users.StartUserRegistration, start_registration(user_id, login, again, command_id=command_id))
    await refused(insider.register_user(login, same_user, user_id))
    await refused(insider.register_user(f"{login} 2", same_user))
    bad = start_registration(new_id(), login, short * 40, email="no e-mail")
    assert set((await refused(insider.call(insider.users.StartUserRegistration, bad))).fields) == {"email", "password"}
    await insider.batch(item(start_registration(new_id(), login, batched)))
    third = start_registration(new_id(), f"{login}3", packed_one)
    sent = await insider.call(insider.commands.Send, command_pb2.SendRequest(command=packed(third)))
    await insider.ended_registration((third.user_id, sent.receipt))
    await refused(caller(roles=[Role.USER]).register_user(login, guess))
    await refused(caller(token="no token").register_user(login, guess))
    assert await insider.verify(login, right) == user_id
    assert (await refused(insider.verify(login, guess))).reason == "LOGIN_REFUSED"
    assert (await refused(insider.verify(f"nobody{mark}", guess))).reason == "LOGIN_REFUSED"
    record = await insider.command(command_id)
    assert right not in str(record)
    assert user_pb2.StartUserRegistrationRequest.FromString(record.command.value) == user_pb2.StartUserRegistrationRequest(
        user_id=user_id, login=login, email="somebody@example.com"
    )
    for one in (user_id, failed, third.user_id):
        await desk.ended(tenant, "registration", one)

    await broker_has(shared_stack, sent.receipt.position)
    with psycopg.connect(shared_stack.databases.write.admin) as connection:
        rows = connection.execute("SELECT subject_id, password_hash FROM credentials WHERE tenant = %s", [tenant]).fetchall()
    hashes: dict[str, str] = dict(rows)
    assert hashes.keys() == {user_id, third.user_id}  # that of the failed one is gone

    async def control() -> bool:
        found = places(shared_stack, login)
        return {"write.commands", "write.events", "read.users"} <= found and any(one.startswith("nats") for one in found)

    await eventually(control, 30, every_s=0.5)
    assert places(shared_stack, *secrets, mark) == set()
    assert places(shared_stack, "$argon2id$") == {"write.credentials"}
    assert places(shared_stack, *[digest for text in hashes.values() for digest in text.split("$")[-2:]]) == {"write.credentials"}

"""Users who are kept up and in the end deactivated: what their summaries show, whose the login is, who can log in."""

from __future__ import annotations

import asyncio

import grpc.aio
import psycopg
import pytest

from bank.v1 import user_pb2, user_query_pb2
from foldline.v1 import command_pb2
from shared.platform.identity import Role
from tests.e2e.conftest import Caller
from tests.support.clients.bank import Bank, new_id, read_refusal, refused, tried
from tests.support.system.stack import Stack

SUCCEEDED = user_query_pb2.REGISTRATION_STATUS_SUCCEEDED
FAILED = user_query_pb2.REGISTRATION_STATUS_FAILED
PASSWORD = "correct horse battery"
ROUNDS = 6


async def registered(bank: Bank, login: str, password: str = PASSWORD) -> str:
    """The id of a user whose registration succeeded."""
    user = await bank.ended_registration(await bank.register_user(login, password))
    assert user.status == SUCCEEDED
    return user.user_id


async def test_e_mail_and_roles_are_changed_and_shown(bank: Bank) -> None:
    """Each change is an event, and what changes nothing is none."""
    tweedle = await registered(bank, "Tweedle")
    assert list((await bank.user(tweedle)).roles) == ["user"]
    changed = await bank.change_email(tweedle, "dum@example.com")
    assert (await bank.change_email(tweedle, "dum@example.com")).events_appended == 0
    promoted = await bank.change_roles(tweedle, "user", "tenant_admin")
    assert (await bank.change_roles(tweedle, "tenant_admin", "user")).events_appended == 0
    assert (changed.version, promoted.version) == (3, 4)
    user = await bank.user(tweedle, promoted.consistency_token)
    assert (user.email, list(user.roles), user.login) == ("dum@example.com", ["tenant_admin", "user"], "Tweedle")
    demoted = await bank.change_roles(tweedle, "user")
    user = await bank.user(tweedle, demoted.consistency_token)
    assert (list(user.roles), user.status, user.HasField("deactivated_at")) == (["user"], SUCCEEDED, False)
    assert await bank.verify("tweedle", PASSWORD) == tweedle


async def test_a_deactivated_users_login_is_anothers(insider: Bank, shared_stack: Stack, tenant: str) -> None:
    """In one transaction the login is released and the hash is gone; who is registered then has it with another password."""
    first = await registered(insider, "Alice")
    receipt = await insider.deactivate(first)
    assert receipt.events_appended == 2
    [started, _, deactivated] = await insider.stream("user", first)
    login_id = user_pb2.UserRegistrationStarted.FromString(started.payload).login_id
    assert user_pb2.UserDeactivated.FromString(deactivated.payload) == user_pb2.UserDeactivated(user_id=first, login_id=login_id)
    released = (await insider.stream("login", login_id))[-1]
    assert (released.type, released.position) == ("bank.v1.LoginReleased", deactivated.position + 1)
    assert hashes(shared_stack, tenant) == set()
    assert (await refused(insider.verify("alice", PASSWORD))).reason == "LOGIN_REFUSED"

    user = await insider.user(first, receipt.consistency_token)
    assert user.deactivated_at.ToNanoseconds() == deactivated.recorded_at.ToNanoseconds()
    assert user.status == SUCCEEDED
    assert (await insider.deactivate(first)).events_appended == 0
    for call in (insider.change_email(first, "a@example.com"), insider.change_roles(first, "user")):
        told = await refused(call)
        assert (told.code, told.reason) == ("FAILED_PRECONDITION", "USER_DEACTIVATED")

    second = await registered(insider, "ALICE", PASSWORD + " of the second")
    assert await insider.verify("alice", PASSWORD + " of the second") == second
    assert (await refused(insider.verify("alice", PASSWORD))).reason == "LOGIN_REFUSED"
    assert (await insider.deactivate(first)).events_appended == 0
    assert await insider.verify("alice", PASSWORD + " of the second") == second
    assert hashes(shared_stack, tenant) == {second}


def hashes(stack: Stack, tenant: str) -> set[str]:
    """Whose hashes are kept."""
    with psycopg.connect(stack.databases.write.admin) as connection:
        rows = connection.execute("SELECT subject_id FROM credentials WHERE tenant = %s", [tenant]).fetchall()
    return {subject_id for (subject_id,) in rows}


async def test_who_failed_to_register_is_changed_no_more(bank: Bank, shared_stack: Stack, tenant: str) -> None:
    """And leaves no hash."""
    first = await registered(bank, "alice")
    second = await bank.ended_registration(await bank.register_user("alice", PASSWORD))
    assert second.status == FAILED
    for call in (
        bank.change_email(second.user_id, "a@example.com"),
        bank.change_roles(second.user_id, "user"),
        bank.deactivate(second.user_id),
    ):
        told = await refused(call)
        assert (told.code, told.reason) == ("FAILED_PRECONDITION", "REGISTRATION_FAILED")
    assert hashes(shared_stack, tenant) == {first}


async def test_a_registration_is_not_ended_by_a_deactivation(bank: Bank) -> None:
    """While it is under way there is no user to deactivate: the caller is told so, or it has ended already."""
    for nth in range(ROUNDS):
        user_id, receipt = await bank.register_user(f"alice{nth}", PASSWORD)
        told = await tried(bank.deactivate(user_id))
        assert told in ("", "REGISTRATION_UNDER_WAY")
        assert (await bank.ended_registration((user_id, receipt))).status == SUCCEEDED
        assert await verified(bank, f"alice{nth}") == (user_id if told else "LOGIN_REFUSED")


async def test_deactivating_while_somebody_logs_in(bank: Bank) -> None:
    """Whoever is checked at that moment is the user or nobody; afterwards it is nobody."""
    for nth in range(ROUNDS):
        user = await registered(bank, f"alice{nth}")
        checks = [verified(bank, f"alice{nth}") for _ in range(3)]
        *told, _ = await asyncio.gather(*checks, bank.deactivate(user))
        assert set(told) <= {user, "LOGIN_REFUSED"}
        assert await verified(bank, f"alice{nth}") == "LOGIN_REFUSED"


async def test_deactivating_while_others_want_the_login(bank: Bank) -> None:
    """At most one of them gets it, and if none does, the next one who asks; nobody is a user without it."""
    for nth in range(ROUNDS):
        login = f"alice{nth}"
        first = await registered(bank, login)
        asked = asyncio.gather(*[bank.register_user(login, PASSWORD) for _ in range(3)])
        started, _ = await asyncio.gather(asked, bank.deactivate(first))
        others = [await bank.ended_registration(one) for one in started]
        succeeded = [user.user_id for user in others if user.status == SUCCEEDED]
        assert len(succeeded) <= 1
        assert {user.reason for user in others if user.status == FAILED} <= {"LOGIN_TAKEN"}
        holder = succeeded[0] if succeeded else await registered(bank, login)
        assert await verified(bank, login) == holder


async def verified(bank: Bank, login: str) -> str:
    """Whose login it is, or why nobody is told."""
    try:
        return await bank.verify(login, PASSWORD)
    except grpc.aio.AioRpcError as error:
        return read_refusal(error).reason


async def test_the_deactivated_are_listed(bank: Bank) -> None:
    """Alone, page by page, or with all others."""
    users = [await registered(bank, f"user{nth}") for nth in range(3)]
    for user in (users[0], users[2]):
        token = (await bank.deactivate(user)).consistency_token
    request = user_query_pb2.ListUsersRequest(
        page_size=1, filter=user_query_pb2.UserFilter(deactivated=True, status=SUCCEEDED), consistency_token=token
    )
    first = await bank.call(bank.user_queries.ListUsers, request)
    request.page_token = first.next_page_token
    second = await bank.call(bank.user_queries.ListUsers, request)
    assert [user.user_id for user in (*first.users, *second.users)] == [users[0], users[2]]
    assert not second.next_page_token
    everybody = await bank.call(bank.user_queries.ListUsers, user_query_pb2.ListUsersRequest(consistency_token=token))
    assert [user.user_id for user in everybody.users] == users


async def test_other_tenants_users_are_not_there(bank: Bank, caller: Caller) -> None:
    """An administrator of another tenant changes nothing, and is told what somebody is told who asks for nobody."""
    alice, other = await registered(bank, "alice"), caller(tenant=f"other-{new_id()[:8]}")
    for call in (other.deactivate(alice), other.change_email(alice, "a@example.com"), other.change_roles(alice, "user")):
        told = await refused(call)
        assert (told.code, told.reason) == ("NOT_FOUND", "USER_NOT_FOUND")
    assert await bank.verify("alice", PASSWORD) == alice


@pytest.mark.parametrize("roles", [[Role.USER], [Role.READER]], ids=["user", "reader"])
async def test_who_may_not(caller: Caller, roles: list[Role]) -> None:
    """Users are kept up by the tenant's administrators; packed or not."""
    bank = caller(roles=roles)
    request = user_pb2.DeactivateUserRequest(user_id=new_id(), options=command_pb2.CommandOptions(command_id=new_id()))
    packed = command_pb2.SendRequest()
    packed.command.Pack(request)
    for call in (
        bank.deactivate(new_id()),
        bank.change_email(new_id(), "a@example.com"),
        bank.change_roles(new_id(), "user"),
        bank.call(bank.commands.Send, packed),
    ):
        told = await refused(call)
        assert (told.code, told.reason) == ("PERMISSION_DENIED", "ROLE_MISSING")

"""What a role may learn of a thing does not depend on the way in which it asks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from bank.v1 import user_pb2
from foldline.v1 import as_of_pb2
from shared.platform.identity import Role
from tests.e2e.test_time_travel import asked
from tests.support.clients.bank import Bank, read_refusal


async def learned(call: Awaitable[object]) -> bool:
    """Whether the call is answered; anything but a missing role is no answer to this question."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        refusal = read_refusal(error)
        assert (refusal.code, refusal.reason) == ("PERMISSION_DENIED", "ROLE_MISSING"), refusal
        return False
    return True


@pytest.mark.parametrize(
    ("roles", "persons", "users"),
    [
        ([Role.USER], True, False),
        ([Role.TENANT_ADMIN], True, True),
        ([Role.OPERATOR], True, True),
        ([Role.USER, Role.TENANT_ADMIN], True, True),
        ([Role.READER], False, False),
    ],
    ids=lambda it: "+".join(it) if isinstance(it, list) else None,
)
async def test_every_way_gives_a_role_the_same(
    bank: Bank, caller: Callable[..., Bank], roles: list[Role], persons: bool, users: bool
) -> None:
    """Query, the past, stream of events and command log agree, on persons, on users and on their logins."""
    person_id, registered = await bank.register("Alice")
    user_id, started = await bank.register_user("Hatter", "correct horse battery")
    await bank.ended_registration((user_id, started))
    first = (await bank.stream("user", user_id))[0]
    login_id = user_pb2.UserRegistrationStarted.FromString(first.payload).login_id
    reserved = (await bank.stream("login", login_id))[0]
    now = {"as_of": as_of_pb2.AsOf(moment=Timestamp(seconds=4_000_000_000))}
    past: list[tuple[str, Any]] = [("Get", now), ("Explain", now), ("Explain", {})]
    asker = caller(user_id="mallory", roles=roles)
    # Of the log a user sees the user's own commands alone, so there the sender asks.
    sender = caller(user_id="alice", roles=roles)
    assert {
        await learned(asker.person(person_id, registered.consistency_token)),
        *[await learned(asked(asker, rpc, "person", person_id=person_id, **then)) for rpc, then in past],
        await learned(asker.stream("person", person_id)),
        await learned(sender.command(registered.command_id)),
    } == {persons}
    assert {
        await learned(asker.user(user_id)),
        *[await learned(asked(asker, rpc, "user", user_id=user_id, **then)) for rpc, then in past],
        await learned(asker.stream("user", user_id)),
        await learned(asker.stream("login", login_id)),
        await learned(sender.command(started.command_id)),
        await learned(sender.command(reserved.metadata.command_id)),
    } == {users}

"""PostgreSQL stopped and killed under load: callers are told when to come back, and nobody needs a restart."""

from __future__ import annotations

import time

import grpc.aio
import pytest

from deploy.local.system import READ, WRITE
from tests.support.checks.invariants import check, look
from tests.support.checks.stream import published
from tests.support.clients.bank import Bank, channels, new_id, read_refusal, refused, register
from tests.support.clients.traffic import running
from tests.support.system.sealing import place_of, token_with
from tests.support.system.stack import Stack
from tests.support.system.waiting import eventually

ANSWERED_WITHIN_S = 25.0
"""A call that meets an absent database is answered, not left waiting."""


@pytest.mark.parametrize("how", [pytest.param("stop", marks=pytest.mark.long), "kill"])
async def test_postgresql_goes_away_under_load(private_stack: Stack, how: str) -> None:
    """Writes and reads answer UNAVAILABLE with RetryInfo; all goes on when it is back; what was acknowledged is there."""
    stack = private_stack
    pids = {name: stack.pid(name) for name in stack.programs}
    async with running(stack) as traffic, channels(stack) as (write, read):
        bank = Bank(write, read, stack.token("load"))
        token = (await bank.deposit(traffic.accounts[0], 1)).consistency_token
        at = place_of(stack.seal_keys, "load", token).position
        later = token_with(stack.seal_keys, "load", token, position=at + 1_000_000)
        getattr(stack.postgres, how)()
        for call in (
            lambda: bank.register("Alice"),
            lambda: bank.command(new_id()),
            lambda: bank.account(traffic.accounts[0]),
            lambda: bank.account(traffic.accounts[0], later),
        ):
            began = time.monotonic()
            told = await refused(call())
            assert time.monotonic() - began < ANSWERED_WITHIN_S
            assert (told.code, told.reason) == ("UNAVAILABLE", "DATABASE_UNAVAILABLE")
            assert told.retry_after_s is not None
        stack.postgres.start()

        async def answered() -> bool:
            try:
                _, receipt = await bank.register("Bob")
                return (await bank.person(receipt.aggregate_id, receipt.consistency_token)).name == "Bob"
            except grpc.aio.AioRpcError as error:
                if read_refusal(error).code == "UNAVAILABLE":
                    return False
                raise

        await eventually(answered, 60)
        await traffic.more(100)
    assert {name: stack.pid(name) for name in stack.programs} == pids, "a process was started again"
    assert any(told.reason == "DATABASE_UNAVAILABLE" for told in traffic.unavailable)
    assert all(told.retry_after_s is not None for told in traffic.unavailable if told.reason == "DATABASE_UNAVAILABLE")
    picture = await look(stack)
    check(picture, traffic.acknowledged)
    await published(stack.nats.url, picture.line)


async def test_a_command_lost_with_the_database_is_sent_again_under_its_id(private_stack: Stack) -> None:
    """Sent while the database is away, then twice again when it is back: one event, one receipt."""
    stack = private_stack
    async with channels(stack) as (write, read):
        bank = Bank(write, read, stack.token())
        request = register(alice := new_id(), "Alice")
        stack.postgres.kill()
        told = await refused(bank.call(bank.people.RegisterPerson, request))
        assert told.code == "UNAVAILABLE"
        stack.postgres.start()

        async def sent() -> object:
            try:
                return await bank.call(bank.people.RegisterPerson, request)
            except grpc.aio.AioRpcError as error:
                if read_refusal(error).code == "UNAVAILABLE":
                    return None
                raise

        receipt = await eventually(sent, 30)
        assert await bank.call(bank.people.RegisterPerson, request) == receipt
        assert len(await bank.stream("person", alice)) == 1
    assert stack.alive(WRITE)
    assert stack.alive(READ)
    check(await look(stack))

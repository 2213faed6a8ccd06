"""A projector that is frozen past its lease, replaced, and woken: the fence, with real processes."""

from __future__ import annotations

import asyncio

from deploy.local.system import PROJECTOR
from foldline.v1 import projection_pb2, projection_pb2_grpc
from shared.platform.identity import Role
from tests.support.clients.bank import Bank, channels
from tests.support.system.stack import Stack
from tests.support.system.waiting import eventually

BALANCE = 5


async def test_a_projector_that_was_stopped_and_woken_writes_nothing_twice(stack: Stack) -> None:
    """While it sleeps a stand-by takes over; woken in the middle of the load, it adds no money a second time."""
    await stack.start_all()
    standby = stack.replica(PROJECTOR)
    stack.start(standby)
    async with channels(stack) as (write, read):
        bank = Bank(write, read, stack.token())
        person_id, _ = await bank.register("Alice")
        account_id, _ = await bank.open(person_id)
        deposited = 0

        async def deposit(times: int) -> str:
            nonlocal deposited
            token = ""
            for _ in range(times):
                token = (await bank.deposit(account_id, BALANCE)).consistency_token
                deposited += BALANCE
            return token

        # Frozen under load, so that it may be anywhere in a batch. Whichever leads, both are frozen and woken in turn.
        for name in (PROJECTOR, standby):
            load = asyncio.create_task(deposit(40))
            await asyncio.sleep(0.05)
            stack.sigstop(name)
            token = await load

            async def there(token: str = token) -> bool:
                return (await bank.account(account_id, token)).balance_minor == deposited

            await eventually(there, 30)
            load = asyncio.create_task(deposit(40))
            stack.sigcont(name)
            token = await load
            assert (await bank.account(account_id, token)).balance_minor == deposited
        totals = (await bank.person(person_id, token)).total_balances
        assert [(total.currency, total.total_minor) for total in totals] == [("USD", str(160 * BALANCE))]

        operator = Bank(write, read, stack.token("acme", "olga", [Role.OPERATOR]))
        shown = await operator.call(
            projection_pb2_grpc.ProjectionServiceStub(read).ListProjections, projection_pb2.ListProjectionsRequest()
        )
        assert [(it.name, it.state, it.reason) for it in shown.projections] == [
            (name, projection_pb2.PROJECTION_STATE_RUNNING, "") for name in ("accounts", "people", "transfers", "users")
        ]

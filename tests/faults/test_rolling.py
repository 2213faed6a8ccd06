"""Replicas are replaced one by one under load, as an upgrade does it: no error reaches a client whose channel retries."""

from __future__ import annotations

import pytest

from deploy.local.system import PROJECTOR, READ, RELAY, SAGA, WRITE
from shared.rpc.client import channel
from tests.support.checks.invariants import check, look
from tests.support.clients.bank import Bank
from tests.support.clients.steady import steady
from tests.support.system.stack import Stack

# The services end themselves within 10 s of work; a machine that stands still meanwhile is given more.
DRAINS_WITHIN_S = 30.0


@pytest.mark.timeout(300)
async def test_every_replica_replaced_under_load(stack: Stack) -> None:
    """Two of each; one after the other gets SIGTERM and starts anew while the other serves. Nothing but answers comes back."""
    replicas = {name: [name, stack.replica(name)] for name in (WRITE, RELAY, READ, PROJECTOR, SAGA)}
    for _, second in replicas.values():
        stack.start(second)
        await stack.wait_ready(second)
    async with channel(_every(stack, replicas[WRITE])) as write, channel(_every(stack, replicas[READ])) as read:
        async with steady(Bank(write, read, stack.token("load"))) as clients:
            for name in (name for pair in replicas.values() for name in pair):
                assert await stack.stop(name, DRAINS_WITHIN_S) == 0, name
                stack.start(name)
                await stack.wait_ready(name)
                await clients.more(20)
        assert clients.transfers
    check(await look(stack))


def _every(stack: Stack, names: list[str]) -> str:
    """The addresses of all replicas, as a name that resolves to several gives them."""
    return "ipv4:" + ",".join(stack.programs[name].address for name in names)

"""The committer under a flood: a tenant within its share is served as if the others sent little. Nothing here is timed."""

from __future__ import annotations

import pytest

from deploy.bootstrap import Database
from shared.commands import committer
from shared.commands.committer import SHARED_LATE, SHARED_MAX
from shared.commands.decide import Command
from shared.commands.intake import Limits, PendingReply
from tests.support.checks.history import check_line
from tests.support.domains.trial import Add, build_registry
from tests.support.fakes.replica import make_command, replica
from tests.support.system.waiting import eventually

BUS = build_registry()
FLOOD = 3000


def adding(counter_id: str, tenant: str) -> Command:
    """A command with an id of its own."""
    return make_command(BUS, Add(counter_id=counter_id, amount=1), tenant=tenant)


def flooding() -> list[list[Command]]:
    """Many commands of one tenant, each for itself."""
    return [[adding(f"flood-{nth % 50}", "flood")] for nth in range(FLOOD)]


async def until_left(flood: PendingReply, left: int) -> None:
    """Waits until so many commands of the flood have no answer yet."""
    await eventually(lambda: flood.remaining <= left, every_s=0)


async def test_a_flood_of_one_tenant_delays_another_by_a_batch(write_db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that comes behind 3,000 of another tenant waits for the batch under way and its own, not for the flood."""
    monkeypatch.setattr(committer, "SHARED_S", 60.0)  # however slowly the machine carries out a third of the flood
    async with replica(write_db, BUS) as one:
        flood = one.committer.submit(flooding())
        await one.committer.submit([[adding("a", "other")]])
        assert FLOOD - flood.remaining <= SHARED_MAX
        await until_left(flood, FLOOD - 1000)
        before = flood.remaining
        await one.committer.submit([[adding("a", "other")]])
        assert before - flood.remaining <= 2 * SHARED_MAX
        await flood
    assert len(await check_line(write_db)) == FLOOD + 2


async def test_a_batch_that_was_decided_ahead_lets_another_tenant_in(write_db: Database) -> None:
    """The first command of a tenant after a long flood of another one joins the next batch, though that is full already."""
    async with replica(write_db, BUS, limits=Limits(batch_commands_max=100)) as one:
        flood = one.committer.submit(flooding())
        await until_left(flood, FLOOD - 500)
        before = flood.remaining
        await one.committer.submit([[adding("a", "other")]])
        assert before - flood.remaining <= 2 * 100 + SHARED_LATE
        await flood


async def test_atomic_batches_of_one_tenant_delay_another_by_one_of_them(write_db: Database) -> None:
    """What is carried out all or not at all cannot be parted, so another tenant waits for one such group, not for all."""
    async with replica(write_db, BUS) as one:
        commands = [command for [command] in flooding()]
        groups = [commands[begin : begin + 250] for begin in range(0, FLOOD, 250)]
        flood = one.committer.submit(groups)
        await until_left(flood, len(groups) - 2)
        before = flood.remaining
        await one.committer.submit([[adding("a", "other")]])
        assert before - flood.remaining <= 3
        await flood
    assert len(await check_line(write_db)) == FLOOD + 1


async def test_two_floods_share_equally(write_db: Database) -> None:
    """When the flood of one tenant is carried out, as many commands of the other are, give or take a batch."""
    async with replica(write_db, BUS) as one:
        first = one.committer.submit(flooding())
        second = one.committer.submit([[adding(f"b-{nth % 50}", "second")] for nth in range(FLOOD + 1000)])
        await first
        assert abs(1000 - second.remaining) <= 2 * SHARED_MAX + 256
        await second

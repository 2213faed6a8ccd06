"""Announcements that a tenant switches off and on: as the line says, also behind a restart and at any place of a batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from google.protobuf.message import Message

from bank.v1 import account_pb2
from deploy.bootstrap import Database
from foldline.v1 import override_pb2, tenant_pb2
from foldline.v1.event_store_pb2 import EventEnvelope
from shared.folds.delivery import Announcements, Email, Notice
from shared.folds.process import Step
from shared.processes import switches
from shared.processes.history import RESTARTED, UNDONE
from tests.integration.shared.processes.test_history import RESTORED, becomes
from tests.support.checks.history import connected
from tests.support.domains.gifts import GIFT, Gift, World, key
from tests.support.fakes.line import uid
from tests.support.system.waiting import eventually

TENANT, OTHER = "acme", "umbrella"


def announcements() -> Announcements:
    """A closed account is announced for every tenant, by a message and by a hook."""
    told = Announcements()
    for name in ("hook", "letter"):
        told.event("*", name, account_pb2.AccountClosed, lambda event, envelope: [Email(to="owner", subject="closed", text="")])
    return told


def close(world: World, number: int, tenant: str = TENANT) -> None:
    """An event that is announced."""
    world.store.append(tenant, uid(number), account_pb2.AccountClosed(account_id=uid(number)))


def switch(world: World, name: str, *, on: bool, tenant: str = TENANT) -> None:
    """The event of a switch."""
    world.store.append(tenant, "overrides", override_pb2.OverrideSwitched(name=name, on=on))


async def told(world: World) -> list[tuple[str, str]]:
    """Which announcement was made of the event of which account, in order."""
    ids = {event.event_id: event.aggregate_id for event in world.store.events}
    rows: list[tuple[str, str]] = await world.query("SELECT source, name FROM deliveries ORDER BY number")
    return [(ids[source], name) for source, name in rows]


async def tells(world: World, *expected: tuple[int, str]) -> None:
    """Waits until these have been announced, and no others."""
    wanted = [(uid(number), name) for number, name in expected]

    async def found() -> bool:
        return await told(world) == wanted

    await eventually(found, 20)


async def test_a_switch_holds_from_its_place_of_the_line_on(world: World) -> None:
    """Within one batch: what stands before it is announced, what stands behind it is not; of another tenant all is."""
    close(world, 1)
    switch(world, "hook", on=False)
    close(world, 2)
    close(world, 3, OTHER)
    switch(world, "hook", on=True)
    close(world, 4)
    async with world.running(world.runner(announcements=announcements())):
        await tells(
            world,
            *((1, "hook"), (1, "letter"), (2, "letter"), (3, "hook"), (3, "letter"), (4, "hook"), (4, "letter")),
        )


async def test_a_switch_outlives_the_runner(world: World) -> None:
    """It was taken with its round, so the next leader goes by it; repeated it is the same."""
    for _ in range(2):
        switch(world, "hook", on=False)
    switch(world, "no-such-announcement", on=False, tenant=OTHER)
    async with world.running(world.runner(announcements=announcements())):
        await eventually(lambda: _rows(world, [(TENANT, "hook", 2), (OTHER, "no-such-announcement", 3)]))
    close(world, 1)
    async with world.running(world.runner(announcements=announcements())):
        await tells(world, (1, "letter"))
        switch(world, "hook", on=True)
        close(world, 2)
        await tells(world, (1, "letter"), (2, "hook"), (2, "letter"))
    assert await _rows(world, [(OTHER, "no-such-announcement", 3)])


async def test_what_the_line_lost_is_forgotten(world: World) -> None:
    """Behind a restore: a switch that stands behind the restored place is as if it had not been made."""
    switch(world, "hook", on=False)
    switch(world, "letter", on=False)
    async with world.running(world.runner(announcements=announcements())):
        await eventually(lambda: _rows(world, [(TENANT, "hook", 1), (TENANT, "letter", 2)]))
    async with connected(world.database.app) as connection:
        await switches.delete_behind(connection, 1, 1)
        assert await switches.load(connection, 1) == {(TENANT, "hook")}
        assert await switches.load(connection, 2) == frozenset()


@pytest.mark.parametrize(
    ("place", "expected"), [(5, []), (4, [(TENANT, "hook", 3)]), (2, [(TENANT, "hook", 1)]), (1, [(TENANT, "hook", 1)]), (0, [])]
)
async def test_switches_are_as_they_were_at_any_place(saga_db: Database, place: int, expected: list[Any]) -> None:
    """Off, off once more, on: whatever was last before the place holds; what stands behind it is gone."""
    async with connected(saga_db.app) as connection:
        made = [switches.Switched(TENANT, "hook", on, position) for position, on in ((1, False), (3, False), (5, True))]
        await switches.save(connection, 1, made)
        await switches.delete_behind(connection, 1, place)
        cursor = await connection.execute("SELECT tenant, name, position FROM switched_off")
        assert await cursor.fetchall() == expected
        kept = await connection.execute("SELECT position FROM announcement_switches ORDER BY position")
        assert await kept.fetchall() == [(position,) for position in (1, 3, 5) if position <= place]


async def test_so_many_switches_are_kept(saga_db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Restored to before the oldest of them, the announcement is as it was just before that one."""
    monkeypatch.setattr(switches, "KEPT_MAX", 3)
    async with connected(saga_db.app) as connection:
        made = [switches.Switched(TENANT, "hook", position % 2 == 0, position) for position in range(1, 7)]
        await switches.save(connection, 1, made)
        kept = await connection.execute("SELECT position FROM announcement_switches ORDER BY position")
        assert await kept.fetchall() == [(4,), (5,), (6,)]
        await switches.delete_behind(connection, 1, 3)
        assert await switches.load(connection, 1) == {(TENANT, "hook")}


async def test_what_is_off_at_the_restored_place_is_off_again(world: World) -> None:
    """Neither a process that runs again announces it, nor is what comes announced by it; what was never off goes on."""

    def react(state: Gift, event: Message, envelope: EventEnvelope) -> Step[Gift] | None:
        step = GIFT.react(state, event, envelope)
        return (
            replace(step, notify=(Notice(name="opened", data={}),))
            if step and isinstance(event, account_pb2.AccountOpened)
            else step
        )

    kind = replace(GIFT, react=react)
    said = announcements()
    for name in ("hook-of-process", "letter-of-process"):
        said.notice("*", name, "gift", "opened", lambda notice: [Email(to="owner", subject="opened", text="")])
    for name in ("hook", "hook-of-process"):
        switch(world, name, on=False)
    world.open(1)
    common = len(world.store.events)
    async with world.running(world.runner(manager=kind, announcements=said)):
        await becomes(world, 1, "given")
        for name in ("hook", "hook-of-process"):
            switch(world, name, on=True)
        world.open(2)
        await becomes(world, 2, "given")
    assert await _rows(world, [])
    del world.store.events[common:]
    world.store.epoch = RESTORED
    async with world.running(world.runner(manager=kind, announcements=said)) as runner, world.desk(kind, said) as desk:
        await eventually(lambda: runner.stopped)
        revision = await desk.accept_history("olga")
        assert [(it.key, it.outcome) for it in revision.processes] == [(key(1), RESTARTED), (key(2), UNDONE)]
        assert await _rows(world, [(TENANT, "hook", 1), (TENANT, "hook-of-process", 2)])
        close(world, 3)

        async def announced() -> bool:
            made = await world.query("SELECT name, count(*) FROM deliveries GROUP BY name ORDER BY name")
            return made == [("hook-of-process", 1), ("letter", 1), ("letter-of-process", 3)]

        await eventually(announced, 10)


async def _rows(world: World, expected: list[Any]) -> bool:
    return await world.query("SELECT tenant, name, position FROM switched_off ORDER BY position") == expected


async def test_a_tenant_that_ends_leaves_no_switch(world: World) -> None:
    """It goes with all else of the tenant; another tenant's stays."""
    switch(world, "hook", on=False)
    switch(world, "hook", on=False, tenant=OTHER)
    world.store.append(TENANT, "tenant", tenant_pb2.TenantClosed(), category="tenant")
    async with world.running(world.runner(announcements=announcements())):
        await eventually(lambda: _rows(world, [(OTHER, "hook", 2)]))

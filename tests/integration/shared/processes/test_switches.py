"""Announcements that a tenant switches off and on: as the line says, also behind a restart and at any place of a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bank.v1 import account_pb2
from deploy.bootstrap import Database
from foldline.v1 import override_pb2, tenant_pb2
from shared.folds.delivery import Announcements, Email
from shared.processes import switches
from tests.support.checks.history import connected
from tests.support.domains.gifts import World
from tests.support.fakes.line import uid
from tests.support.system.waiting import eventually

TENANT, OTHER = "acme", "umbrella"


@pytest.fixture
def world(saga_db: Database, tmp_path: Path) -> World:
    """A line, a write service, a saga database."""
    token_file = tmp_path / "saga.token"
    token_file.write_text("t0ken\n")
    return World(saga_db, token_file)


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


async def _rows(world: World, expected: list[Any]) -> bool:
    return await world.query("SELECT tenant, name, position FROM switched_off ORDER BY position") == expected


async def test_a_tenant_that_ends_leaves_no_switch(world: World) -> None:
    """It goes with all else of the tenant; another tenant's stays."""
    switch(world, "hook", on=False)
    switch(world, "hook", on=False, tenant=OTHER)
    world.store.append(TENANT, "tenant", tenant_pb2.TenantClosed(), category="tenant")
    async with world.running(world.runner(announcements=announcements())):
        await eventually(lambda: _rows(world, [(OTHER, "hook", 2)]))

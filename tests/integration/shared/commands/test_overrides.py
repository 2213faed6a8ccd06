"""Overrides of a tenant: switched by a command, at one place of the line for all replicas."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from deploy.bootstrap import Database
from shared.commands.append import append
from shared.commands.overrides import SwitchOverride, add_switches, current
from shared.commands.registry import SWITCHES_ID, CommandRegistry
from shared.folds.aggregate import Meta
from shared.folds.errors import ReleaseTooOld
from shared.platform.identity import Role
from shared.platform.postgres import Reads
from tests.support.checks.history import check_line, connected, events_of
from tests.support.domains import trial
from tests.support.domains.trial import Add, Counter, Linked, Move, Moved, build_registry, lone
from tests.support.fakes.replica import Replica, reasons, replica

UMBRELLA = "umbrella"
TWICE, NOTE = "twice-as-much", "note-moves"


def note(counter: Counter, event: Moved, meta: Meta) -> Sequence[trial.CounterEvent]:
    """Notes that something moved."""
    return [Linked(counter_id=meta.aggregate_id, links=0)]


def registry() -> CommandRegistry:
    """A decision that is replaced for Umbrella, and a reaction that is added."""
    bus = build_registry()
    on = bus.rows_of(trial.COUNTER)
    on.override(trial.ADD, trial.twice_as_much, tenant=UMBRELLA, name=TWICE)
    on.react(Moved, note, id=lambda e: "notes", tenant=UMBRELLA, name=NOTE)
    add_switches(bus, roles=frozenset({Role.TENANT_ADMIN}))
    return bus


BUS = registry()


async def switch(one: Replica, name: str, *, on: bool, tenant: str = UMBRELLA) -> str:
    """Switches; returns what became of the command."""
    return reasons([await one.ask_one(SwitchOverride(name=name, on=on), tenant=tenant)])[0]


async def totals(database: Database) -> dict[str, int]:
    """The total of Umbrella's counters, by name."""
    found: dict[str, int] = {}
    for event in await events_of(database):
        if event.type == "trial.Added":
            added = BUS.codecs.decode(event.type, event.payload)
            found[event.aggregate_id] = found.get(event.aggregate_id, 0) + added.amount
    return found


async def test_an_override_is_on_until_it_is_switched_off(write_db: Database) -> None:
    """And on again. A switch that changes nothing is no event; a name that the tenant has not is refused."""
    async with replica(write_db, registry()) as one:
        await one.ask_one(Add(counter_id="a", amount=1), tenant=UMBRELLA)
        assert await switch(one, TWICE, on=False) == "completed"
        await one.ask_one(Add(counter_id="b", amount=1), tenant=UMBRELLA)
        assert await switch(one, TWICE, on=True) == "completed"
        assert await switch(one, TWICE, on=True) == "completed"
        await one.ask_one(Add(counter_id="c", amount=1), tenant=UMBRELLA)
        assert await switch(one, "no-such-thing", on=False) == "OVERRIDE_NOT_FOUND"
        assert await switch(one, TWICE, on=False, tenant="acme") == "OVERRIDE_NOT_FOUND"
    assert await totals(write_db) == {"a": 2, "b": 1, "c": 2}
    assert [event.version for event in await events_of(write_db) if event.category == "overrides"] == [1, 2]


async def test_a_reaction_is_switched_too(write_db: Database) -> None:
    """Off, the event leads to nothing more."""
    async with replica(write_db, registry()) as one:
        for on in (True, False):
            await switch(one, NOTE, on=on)
            await one.ask_one(Move(counter_id="a", to_id="b", amount=0), tenant=UMBRELLA)
    assert [event.type for event in await check_line(write_db) if event.aggregate_id == "notes"] == ["trial.Linked"]


async def test_a_switch_in_a_batch_is_seen_by_what_comes_behind_it(write_db: Database) -> None:
    """One call, one commit, in the order of the call."""
    async with replica(write_db, registry()) as one:
        add = [one.command(Add(counter_id=name, amount=1), tenant=UMBRELLA) for name in ("a", "b")]
        await one.ask(add[0], one.command(SwitchOverride(name=TWICE, on=False), tenant=UMBRELLA), add[1])
    assert await totals(write_db) == {"a": 2, "b": 1}


async def test_another_replica_decides_by_the_switch_as_it_is_on_the_line(write_db: Database) -> None:
    """Its cache is behind: the append finds that, and the command is decided again."""
    async with replica(write_db, registry()) as one, replica(write_db, registry()) as other:
        for nth in range(10):
            assert await switch(one, TWICE, on=bool(nth % 2)) == "completed"
            assert reasons([await other.ask_one(Add(counter_id=f"c{nth}", amount=1), tenant=UMBRELLA)]) == ["completed"]
    assert await totals(write_db) == {f"c{nth}": 1 + nth % 2 for nth in range(10)}


async def test_two_replicas_switch_and_add_at_once(write_db: Database) -> None:
    """Each amount is that of the switch before it on the line."""
    async with replica(write_db, registry()) as one, replica(write_db, registry()) as other:
        adds = [other.ask_one(Add(counter_id=f"c{nth}", amount=1), tenant=UMBRELLA) for nth in range(30)]
        switches = [switch(one, TWICE, on=bool(nth % 2)) for nth in range(30)]
        await asyncio.gather(*(each for pair in zip(adds, switches, strict=True) for each in pair))
    on = True
    for event in await check_line(write_db):
        if event.category == "overrides":
            on = not on
        else:
            added = BUS.codecs.decode(event.type, event.payload)
            assert added.amount == (2 if on else 1)


async def test_a_tenant_without_overrides_reads_no_switches(write_db: Database) -> None:
    """Its commands are as cheap as before."""
    async with replica(write_db, registry()) as one:
        await one.ask_one(Add(counter_id="a", amount=1))
        await one.ask_one(Add(counter_id="a", amount=1), tenant=UMBRELLA)
        asked = {tenant: one.committer._cache.get((tenant, "overrides", "overrides")) for tenant in ("acme", UMBRELLA)}
    assert [asked["acme"] is None, asked[UMBRELLA] is None] == [True, False]


async def test_the_list_says_what_is_on(write_db: Database) -> None:
    """By name, with what each does."""
    bus = registry()
    reads = Reads(write_db.app, application_name="test")
    await reads.open()
    async with replica(write_db, bus) as one:
        await switch(one, NOTE, on=False)
        found = await current(bus, reads, UMBRELLA)
        assert [(each.name, each.type, each.on) for each in found] == [
            (NOTE, "trial.Moved", False),
            (TWICE, "trial.Add", True),
        ]
        assert found[0].description == "Notes that something moved."
        assert await current(bus, reads, "acme") == []
    await reads.close()


def test_a_reaction_of_one_tenant_has_a_name() -> None:
    """Else nobody could switch it; one of all tenants cannot be switched."""
    on = build_registry().rows_of(trial.COUNTER)
    for tenant, name in ((UMBRELLA, ""), (None, NOTE)):
        with pytest.raises(TypeError, match="has a name"):
            on.react(Moved, note, id=lambda e: "notes", tenant=tenant, name=name)


async def test_switches_that_cannot_be_read_are_no_defect(write_db: Database) -> None:
    """The list of overrides says why it cannot be given, as the commands of the tenant do."""
    key = (UMBRELLA, "overrides", SWITCHES_ID)
    reads = Reads(write_db.app, application_name="test", size_max=1)
    await reads.open()
    try:
        async with connected(write_db.app) as connection:
            await append(connection, 1, lone(key, event={"type": "trial.FromTheFuture"}))
        with pytest.raises(ReleaseTooOld):
            await current(registry(), reads, UMBRELLA)
    finally:
        await reads.close()

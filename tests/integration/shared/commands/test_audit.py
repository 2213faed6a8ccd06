"""The audit: what the events' metadata say of their senders is found by the command log, in order, and from indexes."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from deploy.bootstrap import Database
from foldline.v1 import event_store_pb2
from shared.commands.audit import Place, places, read_events
from shared.commands.log import Wanted
from shared.line.event_store import StoredEvent
from shared.platform.postgres import Connection
from tests.integration.shared.commands.test_log import BEGAN, CAUSE, COURSE, fill, plan_of
from tests.support.checks.history import check_line, connected
from tests.support.domains.trial import Add, Move, Share, build_registry
from tests.support.fakes.replica import make_command, reasons, replica

REGISTRY = build_registry()
COURSE_ID, CAUSE_ID = str(UUID(int=70)), str(UUID(int=71))


def metadata(event: StoredEvent) -> event_store_pb2.EventMetadata:
    """What an event says of its sender."""
    return event_store_pb2.EventMetadata.FromString(event.metadata)


async def pages(connection: Connection, wanted: Wanted, size: int) -> list[Place]:
    """All entries, page by page."""
    found: list[Place] = []
    after: tuple[datetime, str, int] | None = None
    while page := await places(connection, wanted, size, after):
        found += page
        last = page[-1]
        after = last.command.received_at, last.command.command_id, last.nth
    return found


@pytest.fixture
async def line(write_db: Database) -> tuple[Database, list[StoredEvent]]:
    """Commands of several users, for each other, in one course and by one cause; refused ones, and one with many events."""
    senders: list[dict[str, Any]] = [
        {"user_id": "alice"},
        {"user_id": "bob", "on_behalf_of": "alice"},
        {"user_id": "alice", "on_behalf_of": "alice"},
        {"user_id": "bob", "correlation_id": COURSE_ID},
        {"user_id": "carol", "on_behalf_of": "bob", "correlation_id": COURSE_ID, "causation_id": CAUSE_ID},
        {"user_id": "alice", "id": COURSE_ID, "correlation_id": COURSE_ID},
        {"user_id": "bob", "id": CAUSE_ID},
    ]
    async with replica(write_db, REGISTRY) as one:
        for nth, sender in enumerate(senders):
            await one.ask(
                make_command(REGISTRY, Add(counter_id=f"c{nth}", amount=5), **sender),
                make_command(REGISTRY, Add(counter_id="refused", amount=-9), **{**sender, "id": None}),
            )
        share = make_command(
            REGISTRY, Share(counter_id="c0", to_ids=tuple(f"d{nth}" for nth in range(9)), amount=1), user_id="carol"
        )
        atomic = [
            make_command(REGISTRY, Move(counter_id="c1", to_id="c2", amount=1), user_id=user) for user in ("alice", "carol")
        ]
        foreign = make_command(REGISTRY, Add(counter_id="x", amount=1), tenant="umbrella")
        assert reasons(await one.ask(share, foreign)) == ["completed"] * 2
        assert reasons(await one.ask_atomic(*atomic)) == ["completed"] * 2
    return write_db, await check_line(write_db)


def says(event: StoredEvent, wanted: dict[str, Any]) -> bool:
    """Whether an event's own metadata are what is asked for."""
    of = metadata(event)
    user, cause = wanted.get("concerns"), wanted.get("follows")
    return (
        event.tenant == "acme"
        and (user is None or user in (of.user_id, of.on_behalf_of))
        and (cause is None or cause in (of.command_id, of.causation_id))
        and wanted.get("correlation_id", of.correlation_id) == of.correlation_id
    )


@pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"concerns": "alice"},
        {"concerns": "bob"},
        {"concerns": "carol"},
        {"concerns": "nobody"},
        {"correlation_id": COURSE_ID},
        {"follows": CAUSE_ID},
        {"concerns": "bob", "correlation_id": COURSE_ID, "follows": CAUSE_ID},
        {"concerns": "alice", "correlation_id": COURSE_ID},
    ],
    ids=str,
)
async def test_the_events_found_are_those_whose_metadata_say_so(
    line: tuple[Database, list[StoredEvent]], wanted: dict[str, Any]
) -> None:
    """In pages of any size: none is skipped, none comes twice, each comes before its command; and refused ones are there."""
    database, events = line
    expected = [event.position for event in events if says(event, wanted)]
    async with connected(database.app) as connection:
        whole = await places(connection, Wanted(tenant="acme", **wanted), 1000)
        for size in (1, 3, 500):
            assert await pages(connection, Wanted(tenant="acme", **wanted), size) == whole
    positions = [place.position for place in whole if place.nth]
    assert sorted(positions) == expected
    commands = [place.command for place in whole if not place.nth]
    assert len({command.command_id for command in commands}) == len(commands)
    assert sorted(commands, key=lambda row: (row.received_at, row.command_id), reverse=True) == commands
    by_position = {event.position: metadata(event).command_id for event in events}
    assert all(by_position[place.position] == place.command.command_id for place in whole if place.nth)
    for command in commands:
        own = [place.nth for place in whole if place.command == command]
        assert own == sorted(own, reverse=True)
        assert len(own) == command.events_appended + 1
    if not wanted:
        assert {command.status for command in commands} == {"completed", "rejected"}


async def test_what_is_told_of_an_event(line: tuple[Database, list[StoredEvent]]) -> None:
    """Where it stands; while it is boxed only whose it is, and what is purged is not there."""
    database, events = line
    first, second, third = events[:3]
    async with connected(database.owner) as owner:
        await owner.set_autocommit(False)
        await owner.execute("SET LOCAL foldline.boxing = 'on'")
        await owner.execute("DELETE FROM events WHERE position IN (1, 3)")
        await owner.execute(
            """INSERT INTO boxes (tenant, category, aggregate_id, version, location, chain, boxed_at)
               VALUES ('acme', 'counter', 'c0', 1, '', '', now())"""
        )
        await owner.execute("INSERT INTO boxed_events SELECT 1, %s, box_id FROM boxes", (first.event_id,))
        await owner.commit()
    async with connected(database.app) as connection:
        found = await read_events(connection, [1, 2, 3])
    assert set(found) == {1, 2}, third
    assert (found[1].aggregate_id, found[1].type, found[1].version, found[1].boxed) == ("c0", "", 0, True)
    assert (found[2].aggregate_id, found[2].type, found[2].version) == (second.aggregate_id, second.type, second.version)


async def test_every_search_is_answered_by_indexes(write_db: Database) -> None:
    """Each way of a search in the order of time, so that a page reads as many entries as it shows, and no whole table."""
    await fill(write_db, 20_000)
    wanted: dict[str, tuple[Wanted, set[str]]] = {
        "all": (Wanted(tenant="acme"), {"commands_by_time"}),
        "user": (Wanted(tenant="acme", concerns="u3"), {"commands_by_user", "commands_by_behalf"}),
        "course": (Wanted(tenant="acme", correlation_id=COURSE), {"commands_by_correlation", "commands_pkey"}),
        "cause": (Wanted(tenant="acme", follows=CAUSE), {"commands_by_cause", "commands_pkey"}),
    }
    async with connected(write_db.app) as connection:
        for asked, indexes in wanted.values():
            for more in (
                {},
                {"after": (BEGAN, str(uuid4()))},
                {"after": (BEGAN + timedelta(1), str(uuid4())), "including": True},
            ):
                found = await plan_of(connection, asked, **more)
                assert {node["Index Name"] for node in found if "Index Name" in node} == indexes, found
                assert "Seq Scan" not in {node["Node Type"] for node in found}, found
        cursor = await connection.execute(
            """EXPLAIN (FORMAT JSON) SELECT FROM unnest('{1,2}'::bigint[]) AS w(position) JOIN events e USING (position)"""
        )
        [(plans,)] = await cursor.fetchall()
    assert "events_pkey" in str(plans)


async def test_a_time_range_bounds_a_search(line: tuple[Database, list[StoredEvent]]) -> None:
    """By when commands were received: all of these at one moment."""
    database, _ = line
    async with connected(database.app) as connection:
        moment = (await places(connection, Wanted(tenant="acme"), 1))[0].command.received_at
        assert await places(connection, Wanted(tenant="acme", concerns="alice", received_before=moment), 10) == []
        later = moment + timedelta(microseconds=1)
        assert await places(connection, Wanted(tenant="acme", concerns="alice", received_from=later), 10) == []
        assert len(await places(connection, Wanted(tenant="acme", concerns="alice", received_from=moment), 1000)) > 2

"""One command and its one event, appended by the function of their own: the same rows and refusals as of any batch."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest
from msgspec.structs import replace

from deploy.bootstrap import Database
from shared.commands import append as appending
from shared.commands.append import AppendConflict, Batch, NewCredential, NewSnapshot, append
from shared.line.event_store import AggregateKey
from tests.support.checks.history import commands_of, connected, events_of
from tests.support.domains.trial import ALL_BYTES, lone

A: AggregateKey = ("acme", "counter", "a")
B: AggregateKey = ("acme", "counter", "b")


@pytest.mark.parametrize(
    "command",
    [{}, {"causation_id": None, "on_behalf_of": "", "traceparent": "", "payload": b""}],
    ids=["something in every column", "nothing where that is allowed"],
)
async def test_it_stores_what_a_batch_stores(write_db: Database, command: dict[str, Any]) -> None:
    """Every column of both tables, but for what must differ: ids, position and time."""
    ours, theirs = lone(A, command=command), lone(B, command=command, event={"payload": b""})
    async with connected(write_db.app) as connection:
        first = await append(connection, 1, ours)
        await appending._APPEND.row(connection, appending._arrays(1, False, theirs))
    log = await commands_of(write_db)
    (mine,), (other,) = ours.commands, theirs.commands
    stored, like = log["acme", mine.command_id], log["acme", other.command_id]
    assert stored == replace(
        like,
        command_id=mine.command_id,
        aggregate_id="a",
        position=1,
        head=1,
        finished_at=first.recorded_at,
    )
    assert (like.position, like.head, like.status, like.events_appended) == (2, 2, "completed", 1)
    event, other_event = await events_of(write_db)
    assert event == replace(
        other_event,
        position=1,
        event_id=UUID(str(ours.events[0].event_id)),
        aggregate_id="a",
        payload=ALL_BYTES,
        recorded_at=first.recorded_at,
    )


def test_only_a_command_with_its_one_event_is_one() -> None:
    """Whatever needs more than the two rows is a batch, above all what was decided on another aggregate as well."""
    assert appending._is_one(lone(A))
    assert appending._is_one(replace(lone(A), reads={}))
    twice = lone(A)
    more = {
        "a second event": replace(lone(A), events=[*lone(A).events, *lone(A, 2).events]),
        "a second command": replace(twice, commands=twice.commands * 2),
        "no event": replace(lone(A), events=[]),
        "no command": replace(lone(A), commands=[]),
        "a snapshot": replace(lone(A), snapshots=[NewSnapshot(A, 1, 1, b"")]),
        "a credential": replace(lone(A), credentials=[NewCredential("acme", "u1", "hash")]),
        "another aggregate was read": replace(lone(A), reads={A: 0, B: 3}),
        "the event is another aggregate's": replace(lone(A), events=lone(B).events),
        "the event is another tenant's": replace(lone(A), events=lone(("other", "counter", "a")).events),
        "the command was refused": lone(A, command={"status": "rejected"}),
        "the command has an error": lone(A, command={"error": b"\x01"}),
        "the command answers with another version": lone(A, command={"version": 2}),
    }
    assert {what for what, batch in more.items() if appending._is_one(batch)} == set()


async def test_positions_go_on_from_it_and_to_it(write_db: Database) -> None:
    """Without gaps, beside batches of any kind, from an empty line on."""
    async with connected(write_db.app) as connection:
        heads = [
            (await append(connection, 1, batch)).head
            for batch in (
                lone(A),
                lone(A, 2),
                Batch(events=[*lone(B).events, *lone(B, 2).events]),
                lone(A, 3),
                Batch(),
                lone(B, 3),
            )
        ]
    assert heads == [1, 2, 4, 5, 5, 6]
    assert [event.position for event in await events_of(write_db)] == [1, 2, 3, 4, 5, 6]


async def test_what_was_decided_on_an_old_world_writes_nothing(write_db: Database) -> None:
    """A version that is taken, a version on which nothing follows yet, a command that has an outcome, `failed` too."""
    done = lone(A)
    async with connected(write_db.app) as connection:
        await append(connection, 1, done)
        outcomes = {status: lone(B, command={"status": status}) for status in ("scheduled", "started", "rejected", "failed")}
        for status, batch in outcomes.items():
            # A scheduled row has a time and roles, which `append` does not write: it is one of those that were started.
            written = replace(batch.commands[0], status="started" if status == "scheduled" else status)
            await append(connection, 1, replace(batch, commands=[written], events=[], reads={}))
        await schedule(write_db, outcomes["scheduled"].commands[0].command_id)
        stale = [lone(A), replace(done, events=lone(A, 2).events, commands=[replace(done.commands[0], version=2)])]
        stale += [
            lone(B, command={"command_id": known.commands[0].command_id, "fingerprint": b"other"}) for known in outcomes.values()
        ]
        for batch in stale:
            assert appending._is_one(batch)
            with pytest.raises(AppendConflict):
                await append(connection, 1, batch)
        assert len(await events_of(write_db)) == 1
        assert len(await commands_of(write_db)) == 1 + len(outcomes)
        # The one that failed may come again, as the same: that is a batch's business.
        failed = lone(B, command={"command_id": outcomes["failed"].commands[0].command_id})
        assert (await append(connection, 1, failed, again=True)).head == 2
    assert (await commands_of(write_db))["acme", failed.commands[0].command_id].status == "completed"


async def schedule(database: Database, command_id: object) -> None:
    """Makes a command's row one that waits for its time, an hour from now."""
    async with connected(database.owner) as connection:
        await connection.execute(
            "UPDATE commands SET status = 'scheduled', due_at = now() + interval '1 hour', roles = '{user}', finished_at = NULL "
            "WHERE command_id = %s",
            (str(command_id),),
        )


async def test_of_many_at_once_one_wins(write_db: Database) -> None:
    """Ten connections with the same next version: it is there once, and nine are told that the world has moved."""
    async with AsyncExitStack() as stack:
        connections = [await stack.enter_async_context(connected(write_db.app)) for _ in range(10)]
        batches = [lone(A) for _ in connections]
        results = await asyncio.gather(
            *(append(connection, 1, batch) for connection, batch in zip(connections, batches, strict=True)),
            return_exceptions=True,
        )
    assert sorted(type(result).__name__ for result in results) == ["AppendConflict"] * 9 + ["Appended"]
    assert [event.position for event in await events_of(write_db)] == [1]
    winner = next(nth for nth, result in enumerate(results) if not isinstance(result, BaseException))
    assert set(await commands_of(write_db)) == {("acme", batches[winner].commands[0].command_id)}


async def test_its_time_never_decreases(write_db: Database) -> None:
    """Though the clock was set back: the last event was recorded an hour from now."""
    async with connected(write_db.owner) as owner:
        await owner.execute(
            """INSERT INTO events VALUES
               (1, gen_random_uuid(), 'acme', 'counter', 'a', 1, 't', '', clock_timestamp() + interval '1 hour', '')"""
        )
    async with connected(write_db.app) as connection:
        appended = await append(connection, 1, lone(A, 2))
    first, second = await events_of(write_db)
    assert first.recorded_at == second.recorded_at == appended.recorded_at
    assert second.recorded_at > datetime.now(UTC) + timedelta(minutes=59)


async def test_a_row_that_is_refused_leaves_nothing(write_db: Database) -> None:
    """A NUL in a text of the command or of the event, a version below one: neither row is there, and the line goes on."""
    nul = lone(("acme", "counter", "a\0b"))
    bad: list[tuple[Batch, type[Exception]]] = [
        (nul, psycopg.errors.CharacterNotInRepertoire),
        (lone(A, command={"user_id": "\0"}), psycopg.errors.CharacterNotInRepertoire),
        (lone(A, event={"type": "\0"}), psycopg.errors.CharacterNotInRepertoire),
        (lone(A, 0), psycopg.errors.CheckViolation),
    ]
    async with connected(write_db.app) as connection:
        for batch, error in bad:
            assert appending._is_one(batch)
            with pytest.raises(error):
                await append(connection, 1, batch)
        assert (await commands_of(write_db), await events_of(write_db)) == ({}, [])
        assert (await append(connection, 1, lone(A))).head == 1


async def test_nobody_but_the_application_may_call_what_appends(write_db: Database) -> None:
    """No function of the write database is left to everybody, which is what PostgreSQL does with a new one."""
    async with connected(write_db.admin) as admin:
        cursor = await admin.execute(
            """SELECT p.proname FROM pg_proc p CROSS JOIN LATERAL aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
               WHERE p.pronamespace = 'public'::regnamespace AND a.grantee = 0 AND a.privilege_type = 'EXECUTE'"""
        )
        assert await cursor.fetchall() == []
        cursor = await admin.execute("SELECT count(*) FROM pg_proc WHERE proname IN ('append_batch', 'append_one')")
        assert await cursor.fetchall() == [(2,)]

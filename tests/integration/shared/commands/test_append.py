"""The append function on a real database: what it writes, what it refuses, and what it never lets happen."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import psycopg
import pytest
from msgspec.structs import replace

from deploy.bootstrap import Database
from shared.commands import log as command_log
from shared.commands.append import AppendConflict, Batch, NewCommand, NewCredential, NewEvent, NewSnapshot, append
from shared.line.event_store import AggregateKey
from shared.platform.postgres import Connection
from tests.support.checks.history import commands_of, connected, events_of, head_of
from tests.support.system.waiting import eventually

A: AggregateKey = ("acme", "counter", "a")
B: AggregateKey = ("acme", "counter", "b")
NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


def event(key: AggregateKey, version: int, payload: bytes = b"payload") -> NewEvent:
    """An event of some type."""
    return NewEvent(uuid4(), key, version, "trial.Added", payload, b"metadata")


def row(key: AggregateKey, *, command_id: str | None = None, status: str = "completed", last_event: int = 0) -> NewCommand:
    """A row of the command log with something in every column."""
    return NewCommand(
        tenant=key[0],
        command_id=command_id or str(uuid4()),
        type="trial.Add",
        category=key[1],
        aggregate_id=key[2],
        fingerprint=b"\x00\xff",
        payload=b"\x01",
        status=status,
        user_id="alice",
        on_behalf_of="bob",
        correlation_id=str(UUID(int=7)),
        causation_id=str(UUID(int=8)),
        traceparent="00-1-2-01",
        received_at=NOW,
        version=3,
        events_appended=2,
        last_event=last_event,
        error=b"\x02",
    )


async def counts(connection: Connection) -> tuple[int, ...]:
    """How many events, commands and snapshots there are."""
    cursor = await connection.execute(
        "SELECT (SELECT count(*) FROM events), (SELECT count(*) FROM commands), (SELECT count(*) FROM snapshots)"
    )
    [found] = await cursor.fetchall()
    return tuple(found)


async def credentials(database: Database) -> list[tuple[str, str, str]]:
    """All of them, which only the owner can read."""
    async with connected(database.owner) as owner:
        cursor = await owner.execute("SELECT tenant, subject_id, password_hash FROM credentials ORDER BY 1, 2")
        return await cursor.fetchall()


async def test_everything_of_a_batch_is_stored_as_it_was_given(write_db: Database) -> None:
    """Every column of every table, empty and absent values and all 256 bytes too."""
    everything = bytes(range(256))
    events = [event(A, 1, everything), event(B, 1, b""), event(A, 2)]
    first = row(A, last_event=3)
    second = replace(row(B, status="rejected"), causation_id=None, error=None, on_behalf_of="", traceparent="")
    batch = Batch(
        reads={A: 0, B: 0},
        commands=[first, second],
        events=events,
        snapshots=[NewSnapshot(A, 2, 5, everything)],
        credentials=[NewCredential("acme", "u1", "hash-1")],
    )
    async with connected(write_db.app) as connection:
        before = datetime.now(UTC) - timedelta(seconds=60)
        appended = await append(connection, 1, batch)
        assert appended.head == 3
        assert before < appended.recorded_at < datetime.now(UTC) + timedelta(seconds=60)

        stored = await events_of(write_db)
        assert [(e.position, e.event_id, (e.tenant, e.category, e.aggregate_id), e.version) for e in stored] == [
            (1, events[0].event_id, A, 1),
            (2, events[1].event_id, B, 1),
            (3, events[2].event_id, A, 2),
        ]
        assert [(e.type, e.payload, e.metadata) for e in stored] == [
            ("trial.Added", everything, b"metadata"),
            ("trial.Added", b"", b"metadata"),
            ("trial.Added", b"payload", b"metadata"),
        ]
        assert {e.recorded_at for e in stored} == {appended.recorded_at}

        log = await commands_of(write_db)
        assert log["acme", first.command_id] == command_log.StoredCommand(
            tenant="acme",
            command_id=first.command_id,
            type="trial.Add",
            category="counter",
            aggregate_id="a",
            fingerprint=b"\x00\xff",
            payload=b"\x01",
            status="completed",
            user_id="alice",
            on_behalf_of="bob",
            correlation_id=str(UUID(int=7)),
            causation_id=str(UUID(int=8)),
            traceparent="00-1-2-01",
            received_at=NOW,
            finished_at=appended.recorded_at,
            version=3,
            events_appended=2,
            position=3,
            head=3,
            error=b"\x02",
            epoch=(await head_of(write_db)).epoch,
        )
        other = log["acme", second.command_id]
        assert (other.causation_id, other.error, other.on_behalf_of, other.traceparent) == (None, None, "", "")
        assert (other.status, other.position, other.head) == ("rejected", 0, 3)

        cursor = await connection.execute("SELECT tenant, category, aggregate_id, version, schema, state FROM snapshots")
        assert await cursor.fetchall() == [(*A, 2, 5, everything)]
    assert await credentials(write_db) == [("acme", "u1", "hash-1")]


async def test_positions_go_on_from_batch_to_batch(write_db: Database) -> None:
    """Without gaps, also past a batch that has commands alone, and past an empty one."""
    async with connected(write_db.app) as connection:
        assert (await append(connection, 1, Batch())).head == 0
        assert (await append(connection, 1, Batch(commands=[row(A)]))).head == 0
        assert (await append(connection, 1, Batch(reads={A: 0}, events=[event(A, 1), event(A, 2)]))).head == 2
        assert (await append(connection, 1, Batch(commands=[row(A)]))).head == 2
        assert (await append(connection, 1, Batch(reads={B: 0}, events=[event(B, 1)]))).head == 3
    assert [e.position for e in await events_of(write_db)] == [1, 2, 3]


@pytest.mark.parametrize("what", ["written", "read", "read and absent", "read again after it moved", "carried out"])
async def test_a_clash_writes_nothing(write_db: Database, what: str) -> None:
    """An aggregate that was read and has moved, though nothing is written to it, or a command that has an outcome."""
    done, fresh = row(A), row(A)
    c, d = ("acme", "counter", "c"), ("other", "counter", "a")
    async with connected(write_db.app) as connection:
        await append(connection, 1, Batch(commands=[done], events=[event(A, 1), event(A, 2), event(B, 1)]))
        before = await counts(connection)
        stale = Batch(reads={B: 1, d: 0}, commands=[fresh], events=[event(d, 1)], snapshots=[])
        match what:
            case "written":
                stale.reads[A] = 1
                stale.events.append(event(A, 2))
            case "read":
                stale.reads[A] = 1
            case "read and absent":
                stale.reads[c] = 1
            case "read again after it moved":
                stale.reads[B] = 0
            case "carried out":
                stale.commands.append(done)
        stale.snapshots.append(NewSnapshot(d, 1, 1, b"{}"))
        stale.credentials.append(NewCredential("acme", "u1", "hash"))
        with pytest.raises(AppendConflict):
            await append(connection, 1, stale)
        assert await counts(connection) == before
    assert await credentials(write_db) == []


async def test_a_position_that_is_taken_is_a_defect_and_no_clash(write_db: Database) -> None:
    """Somebody wrote to the line past the function, with the lock held by nobody: that is not tried again."""
    async with connected(write_db.owner) as owner, connected(write_db.owner) as other:
        async with other.transaction():
            await other.execute("INSERT INTO events VALUES (1, gen_random_uuid(), 'x', 'x', 'x', 1, 't', '', now(), '')")
            appending = asyncio.create_task(append(owner, 1, Batch(reads={A: 0}, events=[event(A, 1)])))
            await eventually(lambda: waits_for_a_row(write_db))
        with pytest.raises(psycopg.errors.UniqueViolation):
            await appending


async def waits_for_a_row(database: Database) -> bool:
    """Whether somebody waits for another's transaction to end."""
    async with connected(database.admin) as admin:
        cursor = await admin.execute(
            "SELECT 1 FROM pg_stat_activity WHERE datname = %s AND wait_event = 'transactionid'", [database.name]
        )
        return bool(await cursor.fetchall())


async def test_an_outcome_is_final(write_db: Database) -> None:
    """No later row replaces it, whatever it is, and even for who says that it is sent again: the same id is a clash."""
    async with connected(write_db.app) as connection:
        for status in ("started", "completed", "rejected", "cancelled"):
            first = row(A, status=status)
            await append(connection, 1, Batch(commands=[first]))
            for again in (False, True):
                with pytest.raises(AppendConflict):
                    await append(connection, 1, Batch(commands=[replace(first, version=99)]), again=again)
    assert {command.version for command in (await commands_of(write_db)).values()} == {3}


async def test_only_a_failure_is_replaced(write_db: Database) -> None:
    """`failed` may be tried again with the same content; the row then is that of the new try, in every column."""
    first = row(A, status="failed")
    second = replace(
        row(B, command_id=first.command_id, last_event=1),
        type="trial.Other",
        payload=b"p",
        user_id="carol",
        on_behalf_of="dave",
        correlation_id=str(UUID(int=9)),
        causation_id=None,
        traceparent="t",
        received_at=NOW + timedelta(seconds=1),
        version=1,
        events_appended=1,
        error=None,
    )
    async with connected(write_db.app) as connection:
        await append(connection, 1, Batch(commands=[first]))
        other = replace(second, fingerprint=b"another content")
        for refused, again in ((other, False), (other, True), (second, False)):
            with pytest.raises(AppendConflict):
                await append(connection, 1, Batch(commands=[refused], events=[event(B, 1)]), again=again)
        appended = await append(connection, 1, Batch(commands=[second], events=[event(B, 1)]), again=True)
    assert (await commands_of(write_db))["acme", first.command_id] == command_log.StoredCommand(
        tenant="acme",
        command_id=first.command_id,
        type="trial.Other",
        category="counter",
        aggregate_id="b",
        fingerprint=first.fingerprint,
        payload=b"p",
        status="completed",
        user_id="carol",
        on_behalf_of="dave",
        correlation_id=str(UUID(int=9)),
        causation_id=None,
        traceparent="t",
        received_at=NOW + timedelta(seconds=1),
        finished_at=appended.recorded_at,
        version=1,
        events_appended=1,
        position=1,
        head=1,
        error=None,
        epoch=(await head_of(write_db)).epoch,
    )


async def test_the_same_command_id_of_two_tenants_is_two_commands(write_db: Database) -> None:
    """Nobody's id is taken by another tenant."""
    first = row(A)
    async with connected(write_db.app) as connection:
        await append(connection, 1, Batch(commands=[first]))
        await append(connection, 1, Batch(commands=[replace(first, tenant="other")]))
    assert set(await commands_of(write_db)) == {("acme", first.command_id), ("other", first.command_id)}


async def test_recorded_at_never_decreases(write_db: Database) -> None:
    """Though the clock was set back: the last event was recorded an hour from now."""
    async with connected(write_db.owner) as owner:
        await owner.execute(
            """INSERT INTO events VALUES
               (1, gen_random_uuid(), 'acme', 'counter', 'a', 1, 't', '', clock_timestamp() + interval '1 hour', '')"""
        )
    async with connected(write_db.app) as connection:
        appended = await append(connection, 1, Batch(reads={A: 1}, events=[event(A, 2)]))
    first, second = await events_of(write_db)
    assert first.recorded_at == second.recorded_at == appended.recorded_at
    assert second.recorded_at > datetime.now(UTC) + timedelta(minutes=59)


async def test_a_row_that_is_refused_leaves_nothing_of_its_batch(write_db: Database) -> None:
    """A NUL in a text, a version below one, an unknown status: no event, no command, no snapshot."""
    nul: AggregateKey = ("acme", "counter", "a\0b")
    bad: list[tuple[Batch, type[Exception]]] = [
        (Batch(events=[event(A, 1), event(nul, 1)]), psycopg.errors.CharacterNotInRepertoire),
        (Batch(events=[event(A, 1), event(B, 0)]), psycopg.errors.CheckViolation),
        (Batch(events=[event(A, 1), event(A, 1)]), AppendConflict),
        (Batch(events=[event(A, 1)], commands=[row(A, status="odd")]), psycopg.errors.CheckViolation),
        (Batch(events=[event(A, 1)], credentials=[NewCredential("acme", "u\0", "h")]), psycopg.errors.CharacterNotInRepertoire),
    ]
    async with connected(write_db.app) as connection:
        for batch, error in bad:
            batch.snapshots.append(NewSnapshot(A, 1, 1, b"{}"))
            batch.commands.append(row(A))
            with pytest.raises(error):
                await append(connection, 1, batch)
            assert await counts(connection) == (0, 0, 0)
        assert (await append(connection, 1, Batch(events=[event(A, 1)]))).head == 1


async def test_a_snapshot_that_is_there_already_stays(write_db: Database) -> None:
    """Two replicas may decide the same; what is there is not worth an error."""
    async with connected(write_db.app) as connection:
        await append(connection, 1, Batch(events=[event(A, 1)], snapshots=[NewSnapshot(A, 1, 1, b"first")]))
        await append(connection, 1, Batch(events=[event(B, 1)], snapshots=[NewSnapshot(A, 1, 1, b"second")]))
        cursor = await connection.execute("SELECT state FROM snapshots")
        assert await cursor.fetchall() == [(b"first",)]
        assert await counts(connection) == (2, 0, 1)


async def test_a_credential_is_replaced_by_the_next(write_db: Database) -> None:
    """Of the same subject of the same tenant, from batch to batch and within one: the last stays."""
    async with connected(write_db.app) as connection:
        for hashes in (["1"], ["2", "3"]):
            batch = Batch(credentials=[NewCredential("acme", "u1", each) for each in hashes])
            batch.credentials.append(NewCredential("other", "u1", "theirs"))
            await append(connection, 1, batch)
    assert await credentials(write_db) == [("acme", "u1", "3"), ("other", "u1", "theirs")]


async def test_a_credential_without_a_hash_is_deleted(write_db: Database) -> None:
    """Of that subject of that tenant alone; nothing is there to delete the second time; the last of a batch counts."""
    async with connected(write_db.app) as connection:
        there = [NewCredential(tenant, user, "hash") for tenant in ("acme", "other") for user in ("u1", "u2")]
        await append(connection, 1, Batch(credentials=there))
        for _ in range(2):
            await append(connection, 1, Batch(credentials=[NewCredential("acme", "u1", None)]))
        assert await credentials(write_db) == [("acme", "u2", "hash"), ("other", "u1", "hash"), ("other", "u2", "hash")]
        new_then_none = [NewCredential("acme", "u1", "new"), NewCredential("acme", "u1", None)]
        none_then_new = [NewCredential("acme", "u2", None), NewCredential("acme", "u2", "new")]
        await append(connection, 1, Batch(credentials=new_then_none + none_then_new))
    assert await credentials(write_db) == [("acme", "u2", "new"), ("other", "u1", "hash"), ("other", "u2", "hash")]


async def test_the_events_of_a_large_batch_keep_their_order(write_db: Database) -> None:
    """Two thousand on two aggregates: positions and versions in the order in which they were given."""
    events = [event((A, B)[nth % 2], nth // 2 + 1, str(nth).encode()) for nth in range(2000)]
    async with connected(write_db.app) as connection:
        await append(connection, 1, Batch(reads={A: 0, B: 0}, events=events))
    stored = await events_of(write_db)
    assert [e.event_id for e in stored] == [e.event_id for e in events]
    assert [e.position for e in stored] == list(range(1, 2001))

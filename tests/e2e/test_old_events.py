"""A line of older contracts, recorded once: everybody who reads it sees the events of today."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import psycopg

from bank.v1 import person_pb2, person_query_pb2
from foldline.v1 import as_of_pb2
from shared.platform.identity import Role
from tests.e2e.conftest import Caller
from tests.e2e.test_archive import box, unbox
from tests.e2e.test_history import state
from tests.support.clients.bank import Bank
from tests.support.system.stack import Stack
from tests.support.system.waiting import eventually

RECORDED = Path(__file__).parent.parent / "fixtures" / "old_line.jsonl"
ALICE, HATTER, HUMPTY = (f"3f6c1c52-7d0a-4a53-9a53-0d2a5e1f0a0{n}" for n in (1, 2, 3))


def restore(stack: Stack, tenant: str) -> int:
    """Puts the recorded events behind the head, as the owner of the database can; returns the position of the last."""
    lines = [json.loads(line) for line in RECORDED.read_text().splitlines()]
    with psycopg.connect(stack.databases.write.owner) as connection:
        connection.execute("SELECT pg_advisory_xact_lock(1, 1)")
        for line in lines:
            row = connection.execute(
                """INSERT INTO events SELECT coalesce(max(position), 0) + 1, gen_random_uuid(), %s, 'person', %s, %s, %s, %s,
                     greatest(clock_timestamp(), max(recorded_at)), %s FROM events RETURNING position""",
                (
                    *(tenant, line["aggregate_id"], line["version"], line["type"]),
                    *(base64.b64decode(line["payload"]), base64.b64decode(line["metadata"])),
                ),
            ).fetchone()
    assert row is not None
    return int(row[0])


async def test_old_events_are_read_everywhere(bank: Bank, caller: Caller, shared_stack: Stack, tenant: str) -> None:
    """Streams, the line, the broker's intake, decisions, history and the archive: each shows what is written today."""
    last = restore(shared_stack, tenant)
    first = last - 3
    # The projection, which has them from the broker or from the store.
    await eventually(lambda: named(bank, HUMPTY), 30)
    assert [(await bank.person(key)).name for key in (ALICE, HATTER, HUMPTY)] == ["Alice Cooper", "Mad Hatter", "Humpty"]
    # The stream and the line.
    stream = await bank.stream("person", ALICE)
    assert [event.type for event in stream] == ["bank.v1.PersonRegistered", "bank.v1.PersonRenamed"]
    assert person_pb2.PersonRegistered.FromString(stream[0].payload).name == "Alice O'Wonderland"
    auditor = caller(user_id="olga", roles=[Role.READER])
    line = await auditor.line(first, 4)
    assert {event.type for event in line} == {"bank.v1.PersonRegistered", "bank.v1.PersonRenamed"}
    # Decisions, history and time travel.
    assert (await state(bank, "person", ALICE, version=1))[1]["name"] == "Alice O'Wonderland"
    why = await bank.call(bank.person_queries.ExplainPerson, person_query_pb2.ExplainPersonRequest(person_id=ALICE, field="name"))
    assert [change.type for change in why.changes] == ["bank.v1.PersonRenamed", "bank.v1.PersonRegistered"]
    then = as_of_pb2.AsOf(token=why.changes[1].origin.token)
    past = await bank.call(bank.person_queries.GetPerson, person_query_pb2.GetPersonRequest(person_id=ALICE, as_of=then))
    assert past.person.name == "Alice O'Wonderland"
    renamed = await bank.rename(HATTER, "Mad Hatter Two")
    assert renamed.version == 2
    await bank.open(ALICE)
    # The archive keeps the bytes as they were stored, and reading through to it shows the same line.
    await box(bank, "person", ALICE)
    await box(bank, "person", HUMPTY)
    assert await auditor.line(first, 4) == line
    await unbox(bank, "person", ALICE)
    assert (await bank.stream("person", ALICE))[:2] == stream
    with psycopg.connect(shared_stack.databases.write.owner) as connection:
        stored = connection.execute("SELECT type FROM events WHERE position = %s", (first,)).fetchone()
    assert stored == ("bank.legacy.v1.PersonAdded",)


async def named(bank: Bank, person_id: str) -> bool:
    """Whether the person has a summary."""
    answer = await bank.call(bank.person_queries.ListPersons, person_query_pb2.ListPersonsRequest())
    return person_id in {person.person_id for person in answer.persons}

"""The end of a tenant, seen from outside: closed, purged in all three databases and in the stream, and nobody else touched."""

from __future__ import annotations

import json
import os
from pathlib import Path

import nats
import psycopg
from nats.js.api import StreamInfo

from foldline.v1 import archive_pb2, schedule_pb2
from shared.line.broker import stream_name, tenant_subjects
from tests.e2e.conftest import Caller, Foldline, ProcessAdmin
from tests.support.checks.invariants import check, look
from tests.support.checks.kinds import CLOSED, PURGED
from tests.support.clients.bank import Bank, deposit, options, packed, refused
from tests.support.system.stack import Stack

TABLES = {
    "read": ("people", "person_totals", "accounts", "movements", "transfers", "users", "parked_keys"),
    "saga": ("processes", "process_commands", "process_timers", "process_history", "deliveries", "parked_events"),
    "write": ("commands", "snapshots", "credentials", "boxes", "schedules"),
}


async def history(bank: Bank) -> tuple[str, str]:
    """A little of everything: transfers, a registration, a box, a schedule; returns an account and a transfer."""
    alice, _ = await bank.register("Alice")
    blue, _ = await bank.open(alice)
    red, _ = await bank.open(alice, name="red")
    await bank.deposit(blue, 20_000_00)
    started = await bank.transfer(blue, red, 18_000_00)
    await bank.ended_transfer(started)
    again = schedule_pb2.CreateScheduleRequest(command=packed(deposit(blue, 1)), cron="0 0 1 1 *", time_zone="UTC")
    await bank.call(bank.schedules.CreateSchedule, again)
    await bank.ended_registration(await bank.register_user("alice", "the secret of Alice"))
    gone, _ = await bank.register("Boxed")
    for nth in range(12):
        await bank.rename(gone, f"Boxed {nth}")
    request = archive_pb2.BoxAggregateRequest(options=options(), aggregate_type="person", aggregate_id=gone)
    await bank.call(bank.archive.BoxAggregate, request)
    return blue, started[0]


def names_in(file: Path) -> set[str]:
    """The names in the readable contents of events."""
    contents = [json.loads(line)["content"] for line in file.read_text().splitlines()]
    return {content["name"] for content in contents if "name" in content}


def rows(stack: Stack, tenant: str) -> dict[str, int]:
    """What is left of a tenant, by database and table, where there is anything."""
    found: dict[str, int] = {}
    for service, tables in TABLES.items():
        with psycopg.connect(getattr(stack.databases, service).admin) as connection:
            for table in tables:
                [(count,)] = connection.execute(f"SELECT count(*) FROM {table} WHERE tenant = %s", (tenant,)).fetchall()
                if count:
                    found[f"{service} {table}"] = count
    return found


async def messages(stack: Stack, tenant: str) -> int:
    """How many messages of a tenant the stream has."""
    client = await nats.connect(stack.nats.url)
    try:
        streams = client.jetstream()
        info: StreamInfo = await streams.stream_info(stream_name(1), subjects_filter=tenant_subjects(1, tenant))
        return sum((info.state.subjects or {}).values())
    finally:
        await client.close()


async def test_a_tenant_is_purged_everywhere(
    shared_stack: Stack, caller: Caller, tenant: str, foldline: Foldline, desk: ProcessAdmin, tmp_path: Path
) -> None:
    """Shown, exported; then all rows and messages go, the certificate says what, and the other tenant's data is the same."""
    mine, other = caller(), caller(tenant=f"{tenant}-o")
    blue, transfer = await history(mine)
    their_blue, _ = await history(other)
    theirs = rows(shared_stack, f"{tenant}-o")
    assert len(rows(shared_stack, tenant)) >= 10
    code, shown = foldline("tenant", "purge", tenant)
    assert (code, shown["closed"], shown["rows"]["credentials"]) == (0, False, 1)
    assert (await mine.deposit(blue, 1)).events_appended == 1
    assert foldline("tenant", "purge", tenant, "--yes-purge", "acme", output="text")[0] == 2

    folder = str(tmp_path / "export")
    code, exported = foldline("tenant", "export", tenant, folder)
    assert (code, exported["tenant"]) == (0, tenant)
    assert exported["events"] == shown["rows"]["events"] + shown["rows"]["boxed_events"] + 1
    assert exported["commands"] == shown["rows"]["commands"] + 1
    assert exported["schedules"] == shown["rows"]["schedules"] == 1
    assert foldline("tenant", "verify", folder) == (0, exported)
    assert foldline("tenant", "export", tenant, folder, output="text")[0] == 2
    assert names_in(tmp_path / "export" / "events.jsonl") >= {"Alice", "Boxed 11"}

    found = rows(shared_stack, tenant).items()
    before = {name.split()[1]: count for name, count in found if not name.startswith("write ")}
    file = tmp_path / "certificate.json"
    code, told = foldline("tenant", "purge", tenant, "--yes-purge", tenant, "--certificate", str(file))
    assert code == 0
    assert (told["stage"], told["asked_by"], told["gone"]["credentials"]) == ("TENANT_PURGE_STAGE_DONE", "olga", 1)
    assert told["gone"]["events"] == shown["rows"]["events"] + 1
    assert json.loads(file.read_text()) == told
    assert {"read accounts", "saga processes"} <= set(told["passed_by"])
    gone = {**told["gone_read"], **told["gone_saga"]}
    assert {"accounts", "movements", "people", "users", "processes", "process_history"} <= before.keys() <= gone.keys()
    assert all(gone[table] >= count for table, count in before.items())
    assert gone["people"] == before["people"]
    assert (gone["parked"], gone["notices"]) == (0, 0)
    assert foldline("tenant", "purged", tenant) == (0, told)

    code, refusal = foldline("tenant", "export", tenant, str(tmp_path / "late"))
    assert (code, refusal["error"]["reason"]) == (1, "TENANT_CLOSED")
    assert sorted(os.listdir(tmp_path)) == ["certificate.json", "endpoints.json", "export"]

    assert rows(shared_stack, tenant) == {}
    assert await messages(shared_stack, tenant) == 1
    assert (await refused(mine.deposit(blue, 1))).reason == "TENANT_CLOSED"
    assert (await refused(mine.register("Alice"))).reason == "TENANT_CLOSED"
    assert (await refused(mine.account(blue))).reason == "ACCOUNT_NOT_FOUND"
    assert await desk.find(tenant=tenant) == []
    assert (await refused(mine.transfer_summary(transfer))).reason == "TRANSFER_NOT_FOUND"

    assert rows(shared_stack, f"{tenant}-o") == theirs
    assert (await other.deposit(their_blue, 1)).events_appended == 1
    picture = await look(shared_stack)
    check(picture)
    code, rebuilt = foldline("projection", "rebuild", "accounts", "--only-if-same")
    assert (code, rebuilt["state"]) == (0, "REBUILD_STATE_SWITCHED")
    assert foldline("projection", "drop-former", "accounts")[0] == 0
    kinds = [event.type for event in picture.line if event.tenant == tenant]
    assert (set(kinds[:-1]), kinds[-1]) == ({PURGED}, CLOSED)

"""Boxing and unboxing over gRPC: out of the tables into the archive, and back as it was."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import grpc.aio

from bank.v1 import person_query_pb2
from foldline.v1 import archive_pb2, event_store_pb2
from shared.platform.identity import Role
from tests.e2e.conftest import Caller
from tests.e2e.test_history import described, state
from tests.support.clients.bank import Bank, Refused, deposit, item, new_id, options, read_refusal, refused
from tests.support.system.stack import Stack


async def box(bank: Bank, kind: str, key: str, **more: Any) -> Any:
    """Boxes an aggregate."""
    request = archive_pb2.BoxAggregateRequest(options=options(**more), aggregate_type=kind, aggregate_id=key)
    return (await bank.call(bank.archive.BoxAggregate, request)).receipt


async def unbox(bank: Bank, kind: str, key: str, **more: Any) -> Any:
    """Puts an aggregate back."""
    request = archive_pb2.UnboxAggregateRequest(options=options(**more), aggregate_type=kind, aggregate_id=key)
    return (await bank.call(bank.archive.UnboxAggregate, request)).receipt


async def boxes(bank: Bank, **wanted: Any) -> list[archive_pb2.Box]:
    """The first page of the tenant's boxes."""
    return list((await bank.call(bank.archive.ListBoxes, archive_pb2.ListBoxesRequest(**wanted))).boxes)


async def verify(bank: Bank, kind: str, key: str, version: int = 0) -> archive_pb2.Box:
    """Checks a box."""
    request = archive_pb2.VerifyBoxRequest(aggregate_type=kind, aggregate_id=key, version=version)
    return (await bank.call(bank.archive.VerifyBox, request)).box


def folder_of(stack: Stack, location: str) -> Path:
    """Where the files of a box are."""
    return stack.logs.parent / "archive" / location


async def hatter(bank: Bank) -> str:
    """A person with eight events."""
    key, _ = await bank.register("Mad Hatter One")
    for name in ("Two", "Three", "Four", "Five", "Six", "Seven", "Eight"):
        await bank.rename(key, f"Mad Hatter {name}")
    return key


async def test_the_mad_hatter_goes_into_the_box_and_comes_back(insider: Bank, caller: Caller, shared_stack: Stack) -> None:
    """C: 8 events in the file with the final snapshot, a tombstone online, refused as boxed; unboxed, all 8, and a new name."""
    key = await hatter(insider)
    before = await insider.stream("person", key)
    assert len(before) == 8
    boxed = await box(insider, "person", key)
    assert (boxed.version, boxed.events_appended, boxed.aggregate_id) == (9, 1, key)

    summary = await insider.person(key, boxed.consistency_token)
    assert (summary.version, summary.HasField("boxed_at")) == (9, True)
    [found] = await boxes(insider)
    assert (found.version, found.events, found.HasField("unboxed_at")) == (8, 8, False)
    folder = folder_of(shared_stack, found.location)
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [line["version"] for line in lines] == list(range(1, 9))
    assert lines[7]["content"] == {"person_id": key, "name": "Mad Hatter Eight"}
    snapshot = json.loads((folder / "snapshot.json").read_text())
    assert (snapshot["version"], snapshot["state"]["name"]) == (8, "Mad Hatter Eight")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["events"], manifest["tenant"], len(manifest["files"])) == (8, before[0].tenant, 2)

    [tombstone] = await insider.stream("person", key)
    assert (tombstone.version, tombstone.type) == (9, "foldline.v1.AggregateBoxed")
    for call in (
        insider.rename(key, "Mad Hatter Nine"),
        insider.open(key),
        insider.close_person(key),
        insider.register("x", key),
    ):
        told = await refused(call)
        assert (told.code, told.reason) == ("FAILED_PRECONDITION", "AGGREGATE_BOXED")
    assert (await refused(state(insider, "person", key, version=3))).reason == "AGGREGATE_BOXED"
    assert (await described(insider, "person", key)).boxed
    auditor = caller(user_id="olga", roles=[Role.READER])
    assert await auditor.line(before[0].position, before[7].position - before[0].position + 1) == await line_of(
        auditor, before[0].position, tombstone.position
    )

    unboxed = await unbox(insider, "person", key)
    after = await insider.stream("person", key)
    assert after[:8] == before
    assert [event.type.rpartition(".")[2] for event in after[8:]] == ["AggregateBoxed", "AggregateUnboxed"]
    assert (unboxed.version, unboxed.events_appended) == (10, 1)
    assert not (await insider.person(key, unboxed.consistency_token)).HasField("boxed_at")
    stored = await described(insider, "person", key)
    assert (stored.boxed, list(stored.snapshot_versions)) == (False, [8])
    renamed = await insider.rename(key, "Mad Hatter Nine")
    assert (renamed.version, (await insider.person(key, renamed.consistency_token)).name) == (11, "Mad Hatter Nine")
    assert (await state(insider, "person", key, version=9))[1]["name"] == "Mad Hatter Eight"

    # Again: the earlier box stays, and both are whole.
    await box(insider, "person", key)
    assert [(one.version, one.HasField("unboxed_at")) for one in await boxes(insider)] == [(11, False), (8, True)]
    for version in (0, 8, 11):
        assert (await verify(insider, "person", key, version)).version == (version or 11)
    again = await unbox(insider, "person", key)
    assert (await insider.person(key, again.consistency_token)).version == again.version == 13
    assert (await insider.stream("person", key))[:11] == [
        *after,
        *(await insider.stream("person", key, from_version=11, events_max=1)),
    ]


async def line_of(auditor: Bank, first: int, last: int) -> list[event_store_pb2.EventEnvelope]:
    """The events of the line in a range, one position a call."""
    found = []
    for position in range(first, last):
        found += await auditor.line(position, 1)
    return [event for event in found if event.position < last][: last - first]


async def test_the_line_is_whole_while_aggregates_are_boxed(insider: Bank, caller: Caller) -> None:
    """ReadAll gives the same events before, during and after, at any page size; a projection is not disturbed."""
    alice, _ = await insider.register("Alice")
    blue, _ = await insider.open(alice)
    key = await hatter(insider)
    await insider.batch(*(item(deposit(blue, 1)) for _ in range(30)))
    first = (await insider.stream("person", alice))[0].position
    auditor = caller(user_id="olga", roles=[Role.READER])
    before = await auditor.line(first)
    await box(insider, "person", key)
    receipt = await box(insider, "account", blue)
    during = await auditor.line(first)
    assert during[: len(before)] == before
    assert [event.position for event in during] == list(range(first, first + len(during)))
    for size in (1, 2, 7, 500):
        assert await auditor.line(first + 1, size) == during[1 : size + 1]
    # The projection follows: the summaries stay what they were.
    summary = await insider.account(blue, receipt.consistency_token)
    assert (summary.balance_minor, (await insider.person(key, receipt.consistency_token)).name) == (30, "Mad Hatter Eight")
    await unbox(insider, "account", blue)
    await unbox(insider, "person", key)
    assert (await auditor.line(first))[: len(during)] == during
    last = await insider.deposit(blue, 1)
    assert (await insider.account(blue, last.consistency_token)).balance_minor == 31


async def test_a_person_is_boxed_with_the_accounts(bank: Bank, caller: Caller) -> None:
    """All that were ever attached, also those that are closed; what is boxed already stays so. Unboxing brings all back."""
    bill, _ = await bank.register("Bill")
    blue, _ = await bank.open(bill)
    red, _ = await bank.open(bill, name="red")
    await bank.deposit(blue, 5)
    await bank.close(red)
    await box(bank, "account", red)
    await box(bank, "person", bill)
    assert {(one.aggregate_type, one.aggregate_id) for one in await boxes(bank)} == {
        ("person", bill),
        ("account", blue),
        ("account", red),
    }
    assert (await refused(bank.deposit(blue, 1))).reason == "AGGREGATE_BOXED"
    # Nor does a transfer reach it: it fails, and the money is back.
    ted, _ = await bank.register("Ted")
    green, _ = await bank.open(ted)
    await bank.deposit(green, 7)
    told = await refused(bank.transfer(green, blue, 7))
    assert told.reason == "AGGREGATE_BOXED"
    await unbox(bank, "person", bill)
    again = await bank.deposit(blue, 1)
    assert again.version == 5
    ended = await bank.ended_transfer(await bank.transfer(green, blue, 7))
    person = await bank.person(bill, again.consistency_token)
    assert person_query_pb2.PersonStatus.Name(person.status) == "PERSON_STATUS_ACTIVE"
    assert (await bank.account_now(blue)).balance_minor == 13
    assert ended.reason == ""


async def test_the_same_command_again_is_answered_the_same(bank: Bank) -> None:
    """By its row in the log: boxed once; the id for something else is refused."""
    key, command_id = await hatter(bank), new_id()
    first = await box(bank, "person", key, command_id=command_id)
    assert await box(bank, "person", key, command_id=command_id) == first
    told = await refused(box(bank, "person", new_id(), command_id=command_id))
    assert (told.code, told.reason) == ("INVALID_ARGUMENT", "COMMAND_ID_REUSED")
    assert (await refused(box(bank, "person", key))).reason == "AGGREGATE_BOXED"
    logged = await bank.command(command_id)
    assert (logged.receipt, logged.user_id) == (first, "alice")
    back = await unbox(bank, "person", key, command_id=new_id())
    assert (await refused(unbox(bank, "person", key))).reason == "AGGREGATE_NOT_BOXED"
    assert back.version == 10
    told = await refused(box(bank, "person", key, expected_version=8))
    assert (told.code, told.reason) == ("ABORTED", "VERSION_MISMATCH")
    assert (await box(bank, "person", key, expected_version=10)).version == 11


async def test_boxing_races_commands(bank: Bank) -> None:
    """Deposits and boxes at once: each deposit that was accepted is inside, or it was refused; never lost."""
    alice, _ = await bank.register("Alice")
    reasons: set[str] = set()
    for _ in range(5):
        blue, _ = await bank.open(alice)

        async def pay(blue: str = blue) -> bool:
            try:
                await bank.deposit(blue, 1)
            except grpc.aio.AioRpcError as error:
                reasons.add(read_refusal(error).reason)
                return False
            return True

        paid, two = await asyncio.gather(
            asyncio.gather(*(pay() for _ in range(40))),
            asyncio.gather(box(bank, "account", blue), box(bank, "account", blue), return_exceptions=True),
        )
        assert sum(not isinstance(one, BaseException) for one in two) <= 1
        if (await described(bank, "account", blue)).boxed:
            await unbox(bank, "account", blue)
        assert (await state(bank, "account", blue))[1]["balance_minor"] == sum(paid)
    assert reasons <= {"AGGREGATE_BOXED"}


async def told_of(bank: Bank, shared_stack: Stack, spoil: Any, name: str = "events.jsonl") -> list[Refused]:
    """What verifying, unboxing say when a file of a fresh box is changed; the file is put right again."""
    key = await hatter(bank)
    await box(bank, "person", key)
    [found] = await boxes(bank, aggregate_type="person", aggregate_id=key)
    file = folder_of(shared_stack, found.location) / name
    good = file.read_bytes()
    spoil(file)
    told = [await refused(verify(bank, "person", key)), await refused(unbox(bank, "person", key))]
    file.unlink(missing_ok=True)
    file.write_bytes(good)
    await unbox(bank, "person", key)
    assert len(await bank.stream("person", key)) == 10
    return told


async def test_a_damaged_box_is_refused_and_changes_nothing(bank: Bank, shared_stack: Stack) -> None:
    """Corrupt, truncated, missing, foreign, of the future: named, and when it is put right, all comes back."""

    def edited(old: bytes, new: bytes) -> Any:
        def edit(file: Path) -> None:
            text = file.read_bytes()
            assert old in text
            file.write_bytes(text.replace(old, new, 1))

        return edit

    for spoil, name, says in (
        (edited(b"Hatter", b"Hacker"), "events.jsonl", "not as manifest.json says"),
        (lambda file: file.write_bytes(file.read_bytes()[:-10]), "events.jsonl", "not as manifest.json says"),
        (lambda file: file.unlink(), "events.jsonl", "missing"),
        (lambda file: file.unlink(), "manifest.json", "missing"),
        (lambda file: file.write_bytes(b""), "manifest.json", "another form"),
        (edited(b'"format": 1', b'"format": 2'), "manifest.json", "newer release"),
        (edited(b'"person"', b'"account"'), "manifest.json", "another aggregate"),
        (edited(b'"chain": "', b'"chain": "0'), "manifest.json", "hash chain"),
        (lambda file: file.write_bytes(b"\xff" * 9), "snapshot.json", "not as manifest.json says"),
    ):
        for told in await told_of(bank, shared_stack, spoil, name):
            assert (told.code, told.reason) == ("FAILED_PRECONDITION", "ARCHIVE_DAMAGED"), told
            assert says in told.text, told

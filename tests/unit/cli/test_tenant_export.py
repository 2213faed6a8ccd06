"""An export is there as a whole or not at all, and whatever is done to its files is found out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from bank.v1 import person_pb2
from cli.tenant_export import COMMANDS, EVENTS, MANIFEST, SCHEDULES, Damaged, ExportWriter, verify
from foldline.v1 import command_pb2, event_store_pb2, retention_pb2, schedule_pb2


def written(folder: Path) -> Path:
    """An export of three events of two people, two commands and a schedule."""
    writer = ExportWriter(folder, "acme")
    for position, person, version in ((2, "a", 1), (5, "b", 1), (9, "a", 2)):
        event = person_pb2.PersonRegistered(person_id=person, name=f"Zoë {position}")
        writer.event(
            event_store_pb2.EventEnvelope(
                position=position,
                event_id=f"id-{position}",
                tenant="acme",
                aggregate_type="person",
                aggregate_id=person,
                version=version,
                type=event.DESCRIPTOR.full_name,
                recorded_at=Timestamp(seconds=position),
                payload=event.SerializeToString(),
                metadata=event_store_pb2.EventMetadata(user_id="alice"),
            )
        )
    for nth in range(2):
        writer.command(command_pb2.CommandRecord(receipt=command_pb2.CommandReceipt(command_id=f"c{nth}"), tenant="acme"))
    writer.schedule(schedule_pb2.Schedule(schedule_id="s", cron="0 9 * * mon"))
    assert not folder.exists()
    writer.end(position=10, epoch="e", shard=1)
    return folder


def test_what_is_written_is_whole_and_readable(tmp_path: Path) -> None:
    """Counts, position, and the content beside the exact bytes; nothing else is left in the folder above."""
    folder = written(tmp_path / "out")
    manifest = verify(folder)
    assert (manifest["events"], manifest["commands"], manifest["position"], manifest["tenant"]) == (3, 2, 10, "acme")
    assert manifest["schedules"] == 1
    assert json.loads((folder / SCHEDULES).read_text())["cron"] == "0 9 * * mon"
    first = json.loads((folder / EVENTS).read_text().splitlines()[0])
    assert (first["content"]["name"], first["position"]) == ("Zoë 2", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("versions", "whole"), [((8,), True), ((1, 2, 8), True), ((1, 3, 8), False), ((2,), False), ((1, 1), False)]
)
def test_of_a_purged_aggregate_the_end_is_there_with_a_beginning_or_none(
    tmp_path: Path, versions: tuple[int, ...], whole: bool
) -> None:
    """The eighth event is the end. Anything else that is missing is found out."""
    writer = ExportWriter(tmp_path / "out", "acme")
    for position, version in enumerate(versions, 1):
        event = retention_pb2.AggregatePurged() if version == 8 else person_pb2.PersonRegistered(person_id="a")
        writer.event(
            event_store_pb2.EventEnvelope(
                position=position,
                event_id=f"id-{position}",
                tenant="acme",
                aggregate_type="person",
                aggregate_id="a",
                version=version,
                type=event.DESCRIPTOR.full_name,
                recorded_at=Timestamp(seconds=position),
                payload=event.SerializeToString(),
            )
        )
    writer.end(position=10, epoch="e", shard=1)
    if whole:
        assert verify(tmp_path / "out")["events"] == len(versions)
    else:
        with pytest.raises(Damaged):
            verify(tmp_path / "out")


def test_a_folder_that_is_there_is_not_touched(tmp_path: Path) -> None:
    """Whatever is in it."""
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError):
        ExportWriter(tmp_path / "out", "acme")


def test_what_was_given_up_leaves_nothing_and_what_was_killed_is_replaced(tmp_path: Path) -> None:
    """A killed one leaves a hidden folder alone."""
    ExportWriter(tmp_path / "out", "acme").discard()
    assert list(tmp_path.iterdir()) == []
    killed = ExportWriter(tmp_path / "out", "acme")
    for file in killed._files.values():
        file.close()
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    verify(written(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def lose_a_line(folder: Path) -> None:
    """The last event, with the sums as they would be."""
    rewritten(folder, lambda lines: lines[:-1])


def lose_the_schedule(folder: Path) -> None:
    """All of its file, with the sums as they would be."""
    rewritten(folder, lambda lines: [], SCHEDULES)


def swap_lines(folder: Path) -> None:
    """Two events, with the sums as they would be."""
    rewritten(folder, lambda lines: [lines[1], lines[0], lines[2]])


def change_a_payload(folder: Path) -> None:
    """One byte of an event, with the sums as they would be."""
    rewritten(folder, lambda lines: [lines[0].replace('"payload":"C', '"payload":"D'), *lines[1:]])


def change_a_tenant(folder: Path) -> None:
    """An event of another tenant, with the sums as they would be."""
    rewritten(folder, lambda lines: [lines[0].replace('"tenant":"acme"', '"tenant":"acne"'), *lines[1:]])


def rewritten(folder: Path, change: Callable[[list[str]], list[str]], name: str = EVENTS) -> None:
    """Changes the lines of a file, and makes the manifest fit but for chain and counts."""
    lines = (folder / name).read_text().splitlines()
    assert change(lines) != lines
    data = "".join(f"{line}\n" for line in change(lines)).encode()
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def cut_a_file(folder: Path) -> None:
    """Half of it is there."""
    data = (folder / COMMANDS).read_bytes()
    (folder / COMMANDS).write_bytes(data[: len(data) // 2])


def lose_the_manifest(folder: Path) -> None:
    """It was not written."""
    (folder / MANIFEST).unlink()


def add_a_file(folder: Path) -> None:
    """That nobody wrote."""
    (folder / "more.jsonl").write_text("{}\n")


def be_of_the_future(folder: Path) -> None:
    """A format that is not known yet."""
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"format": 2}))


@pytest.mark.parametrize(
    "damage",
    [
        lose_a_line,
        lose_the_schedule,
        swap_lines,
        change_a_payload,
        change_a_tenant,
        cut_a_file,
        lose_the_manifest,
        add_a_file,
        be_of_the_future,
    ],
)
def test_damage_is_found_out(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    """Whatever it is, with or without sums that fit."""
    folder = written(tmp_path / "out")
    damage(folder)
    with pytest.raises(Damaged):
        verify(folder)

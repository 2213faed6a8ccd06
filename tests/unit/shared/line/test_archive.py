"""Boxes in a folder: what is written is what is read, whatever the names and bytes."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Raw
from msgspec.structs import replace

from foldline.v1 import override_pb2
from shared.folds.errors import Rejected
from shared.line.archive import Archive, Snapshot, chain, open_archive
from shared.line.event_store import AggregateKey, StoredEvent

KEY: AggregateKey = ("acme", "person", "p1")
SNAPSHOT = Snapshot(2, 1, Raw(b'{"name":"A"}'))
SWITCHED = override_pb2.OverrideSwitched(name="renaming-disabled", on=True).SerializeToString()


def event(version: int = 1, key: AggregateKey = KEY, payload: bytes = SWITCHED, metadata: bytes = b"m") -> StoredEvent:
    """An event of an aggregate, on the line at ten times its version."""
    moment = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC) + timedelta(microseconds=version)
    type_name = "foldline.v1.OverrideSwitched"
    return StoredEvent(10 * version, UUID(int=version), *key, version, type_name, payload, moment, metadata)


def archive_in(folder: Path) -> Archive:
    """An archive in a folder, which is made."""
    made = open_archive(folder.resolve().as_uri())
    assert made is not None
    return made


names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30)


@given(st.tuples(names, names, names), st.binary(max_size=300), st.binary(max_size=50))
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_what_is_read(key: AggregateKey, payload: bytes, metadata: bytes) -> None:
    """Any bytes and any names come back; no name leads out of the folder."""
    with TemporaryDirectory() as folder:
        events = [event(1, key, payload, metadata), event(2, key)]
        archive = archive_in(Path(folder) / "in")
        location, link = asyncio.run(archive.write(key, events, SNAPSHOT))
        box = asyncio.run(archive_in(Path(folder) / "in").read(location, key, link))
        assert (list(box.events), box.snapshot, link) == (events, SNAPSHOT, chain(key, events))
        assert [path.name for path in Path(folder).iterdir()] == ["in"]
        assert len(list((Path(folder) / "in").glob("*/*/*/*/*"))) == 3


def test_two_aggregates_never_share_a_folder(tmp_path: Path) -> None:
    """Names that differ in what a path or a case-folding reader could confuse."""
    archive = archive_in(tmp_path)
    keys = [("a", "b", "c/d"), ("a", "b", "c%2Fd"), ("a", "b/c", "d"), ("a", "b", ".."), ("a", "b", "%2E%2E")]
    locations = {asyncio.run(archive.write(key, [event(1, key)], SNAPSHOT))[0] for key in keys}
    assert len({location.rpartition("/")[0] for location in locations}) == len(keys)


def test_a_line_can_be_read_by_people(tmp_path: Path) -> None:
    """The content is beside the bytes if the contract is known; if not, only the bytes are there."""
    unknown = replace(event(2), type="bank.v9.Unheard")
    location, _ = asyncio.run(archive_in(tmp_path).write(KEY, [event(1), unknown], SNAPSHOT))
    lines = [json.loads(line) for line in (tmp_path / location / "events.jsonl").read_text().splitlines()]
    assert [line["content"] for line in lines] == [{"name": "renaming-disabled", "on": True}, None]
    assert lines[0]["version"] == 1


@pytest.mark.parametrize(
    "changed",
    [
        replace(event(2), position=21),
        replace(event(2), event_id=UUID(int=7)),
        replace(event(2), type="x"),
        replace(event(2), payload=b"x"),
        replace(event(2), metadata=b"x"),
        replace(event(2), recorded_at=event(2).recorded_at + timedelta(microseconds=1)),
    ],
    ids=["position", "id", "type", "payload", "metadata", "time"],
)
def test_another_history_is_another_box(tmp_path: Path, changed: StoredEvent) -> None:
    """Each thing that is known of an event is part of the chain: neither overwrites the other, nor is taken for it."""
    archive = archive_in(tmp_path)
    one, link = asyncio.run(archive.write(KEY, [event(1), event(2)], SNAPSHOT))
    other, other_link = asyncio.run(archive.write(KEY, [event(1), changed], SNAPSHOT))
    assert one != other
    for location, wanted in ((one, other_link), (other, link)):
        with pytest.raises(Rejected, match="hash chain"):
            asyncio.run(archive.read(location, KEY, wanted))


def test_what_was_read_is_kept_within_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last box stays, however large it is; the others only as far as they fit."""
    monkeypatch.setattr("shared.line.archive.CACHED_BYTES_MAX", 1)
    archive = archive_in(tmp_path)
    for name in ("a", "b", "a"):
        key = ("acme", "person", name)
        location, link = asyncio.run(archive.write(key, [event(1, key)], SNAPSHOT))
        assert asyncio.run(archive.events(location, key, link, [10])) == [event(1, key)]
        assert list(archive._cached) == [location]
    with pytest.raises(Rejected, match="other positions"):
        asyncio.run(archive.events(location, key, link, [11]))


@pytest.mark.parametrize("url", ["gopher://x", "no url", "file:///dev/null/x", "s3://"])
def test_a_url_that_names_no_store_is_refused(url: str) -> None:
    """At the start, in a sentence."""
    with pytest.raises(ValueError, match="the archive's URL cannot be used"):
        open_archive(url)

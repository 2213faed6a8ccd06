"""The archive: boxes with the events of an aggregate, a folder each.

A box has three files. `events.jsonl` has a line for each event: its fields, its content as readable JSON where the contract is
known, and the exact bytes; `snapshot.json` the state behind the last of them; `manifest.json` what the box holds, with the size
and SHA-256 of each file and the last link of a hash chain over the events. The database keeps that link: a box whose chain is
another one is not believed.

The name of a box ends with its chain, so what is written under a name is always the same: a box that was left half written, and
two that write it at once, do no harm.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from google.protobuf import descriptor_pool, json_format
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from msgspec import DecodeError as JsonError
from msgspec import Raw, Struct, ValidationError, field, json

from shared.folds.errors import Rejected
from shared.line.event_store import AggregateKey, StoredEvent
from shared.line.files import Store, open_files, refusals, segment

FORMAT = 1
EVENTS, SNAPSHOT, MANIFEST = "events.jsonl", "snapshot.json", "manifest.json"
CACHED_BYTES_MAX = 64 * 1024 * 1024

_ZERO = datetime(1970, 1, 1, tzinfo=UTC)


class Line(Struct, frozen=True, kw_only=True):
    """A line of events.jsonl. `content` is for readers alone."""

    position: int
    event_id: UUID
    version: int
    type: str
    recorded_at_us: int
    content: Any = None
    payload: str
    metadata: str


_LINES = json.Decoder(Line)


class Snapshot(Struct, frozen=True):
    """snapshot.json: the state behind the last event, as the snapshots table has it."""

    version: int
    schema: int
    state: Raw


class FileSum(Struct, frozen=True):
    """What a file must be."""

    bytes: int
    sha256: str


class Manifest(Struct, frozen=True, kw_only=True):
    """manifest.json."""

    format: int
    tenant: str
    aggregate_type: str
    aggregate_id: str
    version: int
    events: int
    chain: str
    files: dict[str, FileSum] = field(default_factory=dict)


class _Format(Struct, frozen=True):
    format: int


class Box(Struct, frozen=True):
    """What is in a box."""

    key: AggregateKey
    events: Sequence[StoredEvent]
    snapshot: Snapshot
    chain: bytes


class Archive:
    """Writes and reads boxes. The last that were read stay in memory, up to CACHED_BYTES_MAX."""

    def __init__(self, store: Store) -> None:
        self._store = store
        # The size of a box's events, and they by position; from the least to the most recently used box.
        self._cached: dict[str, tuple[int, Mapping[int, StoredEvent]]] = {}

    async def write(self, key: AggregateKey, events: Sequence[StoredEvent], snapshot: Snapshot) -> tuple[str, bytes]:
        """Writes a box, reads it back and compares; returns its location and chain.

        Raises Unavailable (ARCHIVE_UNAVAILABLE) or Rejected (ARCHIVE_DAMAGED).
        """
        link_, lines = await asyncio.to_thread(lambda: (chain(key, events), b"".join(map(_line, events))))
        location = f"{'/'.join(map(segment, key))}/{events[-1].version:010d}-{link_.hex()[:16]}"
        files = {EVENTS: lines, SNAPSHOT: json.encode(snapshot) + b"\n"}
        manifest = Manifest(
            format=FORMAT,
            tenant=key[0],
            aggregate_type=key[1],
            aggregate_id=key[2],
            version=events[-1].version,
            events=len(events),
            chain=link_.hex(),
            files={name: FileSum(len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()},
        )
        files[MANIFEST] = json.format(json.encode(manifest)) + b"\n"
        with refusals():
            # The manifest is last: a box without one is not complete.
            for name, data in files.items():
                await self._store.write(f"{location}/{name}", data)
        found = await self.read(location, key, link_)
        if list(found.events) != list(events) or found.snapshot != snapshot:
            raise _damaged(location, "what was read back is not what was written")
        return location, link_

    async def read(self, location: str, key: AggregateKey, wanted: bytes) -> Box:
        """A box whose every byte was checked. `wanted` is the chain that the database has of it.

        Raises Unavailable (ARCHIVE_UNAVAILABLE) or Rejected (ARCHIVE_DAMAGED).
        """
        manifest = await self._manifest(location, key)
        parts = {name: await self._file(location, name) for name in (EVENTS, SNAPSHOT)}
        return await asyncio.to_thread(_checked, location, key, wanted, manifest, parts)

    async def events(self, location: str, key: AggregateKey, wanted: bytes, positions: Iterable[int]) -> list[StoredEvent]:
        """The events of a box that have these positions. Raises as `read` does. The snapshot is not read."""
        found = self._cached.pop(location, None)
        if found is None:
            manifest, data = await self._manifest(location, key), await self._file(location, EVENTS)
            events = await asyncio.to_thread(_checked_events, location, key, wanted, manifest, data)
            found = len(data), {event.position: event for event in events}
        self._cached[location] = found
        while len(self._cached) > 1 and sum(size for size, _ in self._cached.values()) > CACHED_BYTES_MAX:
            del self._cached[next(iter(self._cached))]
        by_position = found[1]
        try:
            return [by_position[position] for position in positions]
        except KeyError as error:
            raise _damaged(location, "it has other positions than those that were boxed") from error

    async def forget(self, tenant: str) -> int:
        """Deletes all boxes of a tenant, half written ones too; returns how many files. Raises Unavailable (ARCHIVE_UNAVAILABLE).

        Killed anywhere: what is left goes at the next call.
        """
        folder = segment(tenant)
        self._cached = {at: found for at, found in self._cached.items() if not at.startswith(f"{folder}/")}
        with refusals():
            return await self._store.forget(folder)

    async def forget_aggregate(self, key: AggregateKey) -> int:
        """Deletes all boxes of an aggregate, as `forget` does those of a tenant."""
        folder = "/".join(map(segment, key))
        self._cached = {at: found for at, found in self._cached.items() if not at.startswith(f"{folder}/")}
        with refusals():
            return await self._store.forget(folder)

    async def _manifest(self, location: str, key: AggregateKey) -> Manifest:
        manifest = _manifest(location, await self._file(location, MANIFEST))
        if (manifest.tenant, manifest.aggregate_type, manifest.aggregate_id) != key:
            raise _damaged(location, f"{MANIFEST} is of another aggregate")
        return manifest

    async def _file(self, location: str, name: str) -> bytes:
        with refusals():
            try:
                return await self._store.read(f"{location}/{name}")
            except FileNotFoundError as error:
                raise _damaged(location, f"{name} is missing") from error


def open_archive(url: str) -> Archive | None:
    """The archive at a URL; None without one. Raises ValueError for a URL that names no store."""
    return Archive(open_files(url)) if url else None


def chain(key: AggregateKey, events: Iterable[StoredEvent]) -> bytes:
    """The last link of the hash chain over an aggregate's events; `box_chain` in the database computes the same."""
    last = hashlib.sha256("\n".join(key).encode()).digest()
    for event in events:
        last = hashlib.sha256(last + _linked(event).encode()).digest()
    return last


def _checked(location: str, key: AggregateKey, wanted: bytes, manifest: Manifest, parts: Mapping[str, bytes]) -> Box:
    """The box that these files make. Raises Rejected (ARCHIVE_DAMAGED)."""
    events = _checked_events(location, key, wanted, manifest, parts[EVENTS])
    _check_sum(location, manifest, SNAPSHOT, parts[SNAPSHOT])
    try:
        snapshot = json.decode(parts[SNAPSHOT], type=Snapshot)
    except JsonError as error:
        raise _damaged(location, "a file has another form") from error
    return Box(key, events, snapshot, wanted)


def _checked_events(location: str, key: AggregateKey, wanted: bytes, manifest: Manifest, data: bytes) -> list[StoredEvent]:
    """The events in a box's file. Raises Rejected (ARCHIVE_DAMAGED)."""
    _check_sum(location, manifest, EVENTS, data)
    try:
        events = [_event(key, one) for one in _LINES.decode_lines(data)]
    except (JsonError, binascii.Error, OverflowError) as error:
        raise _damaged(location, "a file has another form") from error
    if [event.version for event in events] != list(range(1, manifest.events + 1)) or not events:
        raise _damaged(location, "events are missing")
    if chain(key, events) != wanted or manifest.chain != wanted.hex():
        raise _damaged(location, "the hash chain is not the one that was boxed")
    return events


def _check_sum(location: str, manifest: Manifest, name: str, data: bytes) -> None:
    sum_ = manifest.files.get(name)
    if sum_ is None or len(data) != sum_.bytes or hashlib.sha256(data).hexdigest() != sum_.sha256:
        raise _damaged(location, f"{name} is not as {MANIFEST} says")


def _linked(event: StoredEvent) -> str:
    return "\n".join(
        (
            str(event.position),
            str(event.event_id),
            str(event.version),
            event.type,
            str(_us(event.recorded_at)),
            event.payload.hex(),
            event.metadata.hex(),
        )
    )


def _us(moment: datetime) -> int:
    return (moment - _ZERO) // timedelta(microseconds=1)


def _line(event: StoredEvent) -> bytes:
    made = Line(
        position=event.position,
        event_id=event.event_id,
        version=event.version,
        type=event.type,
        recorded_at_us=_us(event.recorded_at),
        content=_readable(event),
        payload=base64.b64encode(event.payload).decode(),
        metadata=base64.b64encode(event.metadata).decode(),
    )
    return json.encode(made) + b"\n"


def _readable(event: StoredEvent) -> Any:
    """The content as JSON; None if its contract is not known here."""
    try:
        kind = GetMessageClass(descriptor_pool.Default().FindMessageTypeByName(event.type))
        return json_format.MessageToDict(kind.FromString(event.payload), preserving_proto_field_name=True)
    except (KeyError, DecodeError):
        return None


def _event(key: AggregateKey, line: Line) -> StoredEvent:
    return StoredEvent(
        position=line.position,
        event_id=line.event_id,
        tenant=key[0],
        category=key[1],
        aggregate_id=key[2],
        version=line.version,
        type=line.type,
        payload=base64.b64decode(line.payload, validate=True),
        recorded_at=_ZERO + timedelta(microseconds=line.recorded_at_us),
        metadata=base64.b64decode(line.metadata, validate=True),
    )


def _manifest(location: str, data: bytes) -> Manifest:
    try:
        format_ = json.decode(data, type=_Format).format
        if format_ > FORMAT:
            raise _damaged(location, f"it has format {format_}: a newer release wrote it")
        return json.decode(data, type=Manifest)
    except (JsonError, ValidationError) as error:
        raise _damaged(location, f"{MANIFEST} has another form") from error


def _damaged(location: str, what: str) -> Rejected:
    return Rejected("ARCHIVE_DAMAGED", f"the box is damaged: {what}", location=location)

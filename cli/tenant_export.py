"""The folder of a tenant's export: written as a whole or not at all, and checked without any service.

`events.jsonl` has a line for each event in the order of the line: its fields, its content as readable JSON where the contract is
known, and the exact bytes of payload and metadata. `commands.jsonl` has a line for each command of the log, the newest first,
`schedules.jsonl` one for each recurring schedule.
`manifest.json` says what the folder holds: position, counts, a hash chain over the events, and size and SHA-256 of each file.

Killed anywhere: beside the folder a hidden one is left, `.NAME.partial`, which the next export replaces.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import shutil
from collections import defaultdict
from pathlib import Path
from typing import IO, Any

from cli.calls import plain, record
from cli.contract import decoded
from foldline.v1 import command_pb2, event_store_pb2, retention_pb2, schedule_pb2

FORMAT = 1
AGGREGATE_PURGED = retention_pb2.AggregatePurged.DESCRIPTOR.full_name
EVENTS, COMMANDS, SCHEDULES, MANIFEST = "events.jsonl", "commands.jsonl", "schedules.jsonl", "manifest.json"
FILES = (EVENTS, COMMANDS, SCHEDULES)


class Damaged(Exception):
    """The folder is not what its manifest says."""


class ExportWriter:
    """Writes an export into a folder that must not be there yet."""

    def __init__(self, folder: Path, tenant: str) -> None:
        """Raises FileExistsError."""
        if folder.exists():
            raise FileExistsError(folder)
        self._folder = folder
        self._partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        self._files: dict[str, IO[bytes]] = {name: (self._partial / name).open("wb") for name in FILES}
        self._sums = {name: hashlib.sha256() for name in self._files}
        self._counts = dict.fromkeys(self._files, 0)
        self._chain = _begin(tenant)
        self._tenant = tenant

    def event(self, envelope: event_store_pb2.EventEnvelope) -> None:
        """Adds an event."""
        made = plain(envelope)
        payload, metadata = envelope.payload, envelope.metadata.SerializeToString()
        content = decoded(envelope.type, payload)
        made["content"] = None if content is None else plain(content)
        made["payload"], made["metadata_bytes"] = _text(payload), _text(metadata)
        self._chain = _link(self._chain, made)
        self._line(EVENTS, made)

    def command(self, row: command_pb2.CommandRecord) -> None:
        """Adds a command."""
        self._line(COMMANDS, {**record(row), "bytes": _text(row.SerializeToString())})

    def schedule(self, schedule: schedule_pb2.Schedule) -> None:
        """Adds a schedule."""
        self._line(SCHEDULES, {**plain(schedule), "bytes": _text(schedule.SerializeToString())})

    def end(self, *, position: int, epoch: str, shard: int) -> dict[str, Any]:
        """Writes the manifest, syncs all, and gives the folder its name; returns the manifest."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        manifest = {
            "format": FORMAT,
            "tenant": self._tenant,
            "shard": shard,
            "epoch": epoch,
            "position": position,
            "events": self._counts[EVENTS],
            "commands": self._counts[COMMANDS],
            "schedules": self._counts[SCHEDULES],
            "chain": self._chain.hex(),
            "files": {
                name: {"bytes": (self._partial / name).stat().st_size, "sha256": self._sums[name].hexdigest()}
                for name in self._files
            },
        }
        with (self._partial / MANIFEST).open("w") as out:
            out.write(json.dumps(manifest, indent=2) + "\n")
            out.flush()
            os.fsync(out.fileno())
        _sync(self._partial)
        self._partial.rename(self._folder)
        _sync(self._folder.parent)
        return manifest

    def discard(self) -> None:
        """Deletes what was written."""
        for file in self._files.values():
            file.close()
        shutil.rmtree(self._partial, ignore_errors=True)

    def _line(self, name: str, made: dict[str, Any]) -> None:
        line = json.dumps(made, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        self._files[name].write(line)
        self._sums[name].update(line)
        self._counts[name] += 1


def verify(folder: Path) -> dict[str, Any]:
    """Reads an export and checks every byte of it; returns the manifest. Raises Damaged."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
        if manifest["format"] > FORMAT:
            raise Damaged(f"it has format {manifest['format']}: a newer release wrote it")
        if (names := {path.name for path in folder.iterdir()}) != {*FILES, MANIFEST}:
            raise Damaged(f"it has other files: {', '.join(sorted(names))}")
        for name in FILES:
            _check_sum(folder / name, manifest["files"][name])
        chain, versions, last = _begin(manifest["tenant"]), defaultdict[tuple[str, str], int](int), 0
        count = 0
        with (folder / EVENTS).open("rb") as lines:
            for line in lines:
                event = json.loads(line)
                base64.b64decode(event["payload"], validate=True)
                stream = (event["aggregate_type"], event["aggregate_id"])
                # Of an aggregate that is purged the end alone is left, or a beginning and the end.
                purged = event["type"] == AGGREGATE_PURGED and event["version"] > versions[stream]
                versions[stream] = event["version"] if purged else versions[stream] + 1
                if event["tenant"] != manifest["tenant"] or event["version"] != versions[stream]:
                    raise Damaged(f"event {event['position']} is not the next of its aggregate")
                if not last < event["position"] <= manifest["position"]:
                    raise Damaged(f"event {event['position']} is out of order")
                chain, last, count = _link(chain, event), event["position"], count + 1
        found = (count, _rows(folder / COMMANDS), _rows(folder / SCHEDULES), chain.hex())
        if found != tuple(manifest[name] for name in ("events", "commands", "schedules", "chain")):
            raise Damaged("events, commands or schedules are missing, or others")
    except (OSError, ValueError, KeyError, TypeError, binascii.Error) as error:
        raise Damaged(f"a file is missing or has another form ({type(error).__name__})") from error
    return manifest


def _rows(file: Path) -> int:
    """How many lines of a file have the bytes of something. Raises ValueError or KeyError."""
    with file.open("rb") as lines:
        return sum(1 for line in lines if base64.b64decode(json.loads(line)["bytes"], validate=True))


def _check_sum(file: Path, wanted: dict[str, Any]) -> None:
    digest = hashlib.sha256()
    with file.open("rb") as data:
        while chunk := data.read(1 << 20):
            digest.update(chunk)
    if (file.stat().st_size, digest.hexdigest()) != (wanted["bytes"], wanted["sha256"]):
        raise Damaged(f"{file.name} is not as {MANIFEST} says")


def _begin(tenant: str) -> bytes:
    return hashlib.sha256(tenant.encode()).digest()


def _link(last: bytes, event: dict[str, Any]) -> bytes:
    """The next link of the chain over what an event is; its readable content is no part of that."""
    names = ("position", "event_id", "aggregate_type", "aggregate_id", "version", "type", "recorded_at")
    parts = [str(event[name]) for name in names] + [event["payload"], event["metadata_bytes"]]
    return hashlib.sha256(last + "\n".join(parts).encode()).digest()


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

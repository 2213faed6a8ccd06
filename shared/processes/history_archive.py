"""The archive of processes that have left the tables: one folder for each sweep, tenant and type.

    <tenant>/processes-<shard>/<type>/<day of the first end>-<a UUID>/processes.jsonl
                                                                      manifest.json

A line has a process with its state and history, as the tables had them; bytes are in base64. The manifest has the number of
lines, and size and SHA-256 of the file. No two sweeps share a folder, so a writer can take back its own. A folder without
manifest was left half written; a process that is in two folders was written again after a kill.

When a tenant is purged, its folder is deleted. When an aggregate is, the sweeps that have a process of its id are written anew
without it: each sweep of the tenant and type is read for that.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Protocol
from uuid import uuid4

from msgspec import DecodeError, Raw, Struct, json

from shared.folds.errors import Rejected
from shared.line.archive import MANIFEST, FileSum
from shared.line.files import Store, refusals, segment

FORMAT = 1
PROCESSES = "processes.jsonl"
WRITE_S = 30.0
"""The longest time that the store may take for one sweep."""


class PastProcess(Struct, frozen=True, kw_only=True):
    """A line of processes.jsonl."""

    type: str
    process_id: str
    # In the type's own form, of this schema.
    state: Raw
    schema: int
    phase: str
    correlation_id: str
    causation_id: str
    on_behalf_of: str
    traceparent: str
    started_at: datetime
    ended_at: datetime
    history: Sequence[dict[str, Any]]


class SweepManifest(Struct, frozen=True, kw_only=True):
    """manifest.json."""

    format: int
    tenant: str
    shard: int
    processes: int
    files: dict[str, FileSum]


class _Name(Struct, frozen=True):
    process_id: str = ""


def _id_of(line: bytes) -> str:
    """The process of a line; its last one is cut off if it was left half written."""
    try:
        return json.decode(line, type=_Name).process_id
    except DecodeError:
        return ""


class SweepStore(Store, Protocol):
    """A store whose files can be listed."""

    async def paths(self, folder: str) -> list[str]:
        """The paths of all files below a folder, in order."""


class HistoryArchive:
    """Writes sweeps, and deletes those of a tenant."""

    def __init__(self, store: SweepStore, shard: int) -> None:
        self._store = store
        self._shard = shard
        self.sweeping = asyncio.Lock()
        """Held from before a sweep is written until its rows are deleted, and while a tenant's sweeps are deleted: what is
        written for a tenant that ends meanwhile would stay."""

    async def write(self, tenant: str, type_: str, processes: Sequence[PastProcess]) -> str:
        """Writes a sweep, reads it back and compares; returns its folder.

        Raises Unavailable (ARCHIVE_UNAVAILABLE) or Rejected (ARCHIVE_DAMAGED).
        """
        lines = await asyncio.to_thread(lambda: [json.encode(process) for process in processes])
        day = min(process.ended_at for process in processes).strftime("%Y-%m-%d")
        return await self._write(tenant, type_, day, lines)

    async def _write(self, tenant: str, type_: str, day: str, lines: Sequence[bytes]) -> str:
        data = b"".join(line + b"\n" for line in lines)
        folder = f"{self._folder(tenant)}/{segment(type_)}/{day}-{uuid4()}"
        manifest = SweepManifest(
            format=FORMAT,
            tenant=tenant,
            shard=self._shard,
            processes=len(lines),
            files={PROCESSES: FileSum(len(data), hashlib.sha256(data).hexdigest())},
        )
        # The manifest is last: a sweep without one is not complete.
        files = {PROCESSES: data, MANIFEST: json.format(json.encode(manifest)) + b"\n"}
        with refusals():
            async with asyncio.timeout(WRITE_S):
                for name, content in files.items():
                    await self._store.write(f"{folder}/{name}", content)
                for name, content in files.items():
                    if await self._store.read(f"{folder}/{name}") != content:
                        raise Rejected("ARCHIVE_DAMAGED", f"{name} is not what was written", location=folder)
        return folder

    async def delete(self, folder: str) -> None:
        """Deletes a sweep. Raises Unavailable (ARCHIVE_UNAVAILABLE)."""
        with refusals():
            await self._store.forget(folder)

    async def forget(self, tenant: str) -> int:
        """Deletes all sweeps of a tenant, half written ones too; returns how many files. Raises Unavailable."""
        with refusals():
            return await self._store.forget(self._folder(tenant))

    async def forget_process(self, tenant: str, types: Sequence[str], process_id: str) -> int:
        """Takes a process of these types out of all sweeps; returns out of how many.

        Killed anywhere: a sweep may be there twice, with and without it, and called again this deletes the former. Raises
        Unavailable (ARCHIVE_UNAVAILABLE) or Rejected (ARCHIVE_DAMAGED).
        """
        count = 0
        for type_ in types:
            with refusals():
                paths = await self._store.paths(f"{self._folder(tenant)}/{segment(type_)}")
            for path in paths:
                folder, _, name = path.rpartition("/")
                if name != PROCESSES:
                    continue
                with refusals():
                    lines = (await self._store.read(path)).splitlines()
                others = [line for line in lines if process_id.encode() not in line or _id_of(line) != process_id]
                if len(others) == len(lines):
                    continue
                if others:
                    await self._write(tenant, type_, folder.rpartition("/")[2][:10], others)
                await self.delete(folder)
                count += 1
        return count

    def _folder(self, tenant: str) -> str:
        return f"{segment(tenant)}/processes-{self._shard}"

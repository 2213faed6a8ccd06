"""A boxer without its RPCs, in this process or in one that kills itself at a step of its work.

`main` takes URL FOLDER box|unbox ID COMMAND_ID STEP: steps are counted from 1, before and after each file that is written or
read and each call of the database; at STEP the process gets SIGKILL. It ends with 0 if it was through before.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from obstore.store import from_url

from foldline.v1 import archive_pb2, command_pb2
from shared.commands import boxing
from shared.commands.boxing import Boxer
from shared.commands.log import StoredCommand
from shared.commands.registry import CommandRegistry
from shared.line.archive import Archive
from shared.line.files import Files, Store
from shared.platform.identity import Call, Identity, Role, current_call
from shared.platform.postgres import Reads
from tests.support.domains.trial import build_registry

TENANT = "acme"


def files_in(folder: Path) -> Files:
    """A store in a folder of this machine."""
    folder.mkdir(parents=True, exist_ok=True)
    return Files(from_url(f"file://{quote(str(folder.resolve()))}"), folder.resolve())


@asynccontextmanager
async def boxer(url: str, store: Store | None, registry: CommandRegistry | None = None) -> AsyncIterator[Boxer]:
    """A boxer of counters, by their own table or another, for an administrator of TENANT."""
    reads = Reads(url, application_name="test", size_max=4)
    await reads.open()
    identity = Identity(tenant=TENANT, user_id="alice", roles=frozenset({Role.TENANT_ADMIN}))
    token = current_call.set(Call(identity, "test", ""))
    try:
        yield Boxer(
            url,
            reads,
            registry or build_registry(),
            Archive(store) if store is not None else None,
            shard=1,
            clock=lambda: datetime.now(UTC),
            roles=frozenset({Role.TENANT_ADMIN}),
        )
    finally:
        current_call.reset(token)
        await reads.close()


async def move(boxer: Boxer, way: str, counter_id: str, command_id: str, version: int | None = None) -> StoredCommand:
    """Boxes or unboxes a counter, at a version if that is given."""
    named: dict[str, Any] = {
        "options": command_pb2.CommandOptions(command_id=command_id, expected_version=version),
        "aggregate_type": "counter",
        "aggregate_id": counter_id,
    }
    if way == "box":
        return await boxer.box(archive_pb2.BoxAggregateRequest(**named))
    return await boxer.unbox(archive_pb2.UnboxAggregateRequest(**named))


class Steps:
    """Counts steps, and ends this process at one of them."""

    def __init__(self, last: int) -> None:
        self._left = last

    def step(self) -> None:
        """One step."""
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


class SteppedStore:
    """A store that counts before and after each file."""

    def __init__(self, store: Store, step: Callable[[], None]) -> None:
        self._store = store
        self._step = step

    async def write(self, path: str, data: bytes) -> None:
        """As in Store."""
        self._step()
        await self._store.write(path, data)
        self._step()

    async def forget(self, folder: str) -> int:
        """As in Store."""
        return await self._store.forget(folder)

    async def read(self, path: str) -> bytes:
        """As in Store."""
        self._step()
        data = await self._store.read(path)
        self._step()
        return data


async def main(url: str, folder: str, way: str, counter_id: str, command_id: str, last: str) -> None:
    """Moves one counter, as far as it gets."""
    steps, call = Steps(int(last)), boxing._call

    async def stepped(*arguments: Any) -> int:
        steps.step()
        head = await call(*arguments)
        steps.step()
        return head

    boxing._call = stepped  # type: ignore[assignment]
    async with boxer(url, SteppedStore(files_in(Path(folder)), steps.step)) as one:
        await move(one, way, counter_id, command_id)

"""An operator's turn: a transaction that locks the runner's checkpoint without moving it, so any instance may serve it.

The leader's round and the turn run one after the other, and the second sees what the first wrote.
Killed anywhere, what is left? The whole turn, or nothing of it. Two at once: the lock orders them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime

from shared.folds.delivery import Announcements
from shared.folds.errors import NotFound, Rejected
from shared.platform.postgres import Connection, Reads
from shared.processes import pending, store, switches
from shared.processes.pending import Pending
from shared.processes.process_type import ProcessType
from shared.processes.records import FOLD_FAILED, Process, ProcessKey
from shared.processes.round import Round
from shared.processes.runner import CHECKPOINT


@dataclass(frozen=True, slots=True)
class Turns:
    """Makes turns."""

    reads: Reads
    kinds: Mapping[str, ProcessType]
    shard: int
    clock: Callable[[], datetime]
    announcements: Announcements

    @asynccontextmanager
    async def many(self, keys: Sequence[ProcessKey]) -> AsyncIterator[tuple[Connection, Round]]:
        """A round for processes, behind the fence. It is written and committed when the block ends."""
        async with self.reads.connection() as connection, connection.transaction():
            await store.lock(connection, CHECKPOINT, self.shard)
            processes = await store.read(await store.select(connection, keys)) if keys else {}
            announced = self.announcements.without(await switches.load(connection, self.shard))
            done = Round(self.kinds, self.clock(), processes, announced)
            yield connection, done
            await store.write(connection, done, due_at=done.now, handed_out=False)
        done.log_defects()

    @asynccontextmanager
    async def one(self, key: ProcessKey) -> AsyncIterator[tuple[Connection, Process, list[Pending], Round]]:
        """A round for one process, with its commands. Raises NotFound (PROCESS_NOT_FOUND)."""
        async with self.many([key]) as (connection, done):
            process = done.processes.get(key)
            if process is None:
                raise _not_found(key)
            yield connection, process, await pending.commands_of(connection, key), done


async def process_of(connection: Connection, key: ProcessKey) -> Process:
    """A process. Raises NotFound (PROCESS_NOT_FOUND)."""
    found = await store.read(await store.select(connection, [key]))
    if key not in found:
        raise _not_found(key)
    return found[key]


async def process_by_id(connection: Connection, key: ProcessKey, types: Iterable[str]) -> Process:
    """The only process of a tenant and an id, of any of these types; the key's own type is not looked at.

    Raises NotFound (PROCESS_NOT_FOUND), Rejected (PROCESS_AMBIGUOUS).
    """
    tenant, _, process_id = key
    found = await store.read(await store.select(connection, [(tenant, type_, process_id) for type_ in types]))
    if not found:
        raise NotFound("PROCESS_NOT_FOUND", f"there is no process {process_id} in tenant {tenant}")
    if len(found) > 1:
        several = ", ".join(sorted(type_ for _, type_, _ in found))
        raise Rejected("PROCESS_AMBIGUOUS", "several processes have this id: name the type", types=several)
    [process] = found.values()
    return process


async def retry(connection: Connection, done: Round, process: Process, commands: Sequence[Pending], user_id: str) -> None:
    """Lets a process go on: gives it the inputs that wait, and makes its commands due at once.

    Raises Rejected (NOTHING_TO_RETRY).
    """
    if not commands and process.trouble != FOLD_FAILED:
        raise Rejected("NOTHING_TO_RETRY", "the process waits for nothing")
    done.operator(process, "retry", user_id)
    for it in commands:
        again = it.given_up and not it.may_have_happened
        after = done.again(process, it.command) if again else it.command
        await pending.send_again(connection, it.command, after, done.now)
    done.replay(process, await pending.take_inputs(connection, process.key))


def _not_found(key: ProcessKey) -> NotFound:
    return NotFound("PROCESS_NOT_FOUND", f"there is no process {key[1]} {key[2]} in tenant {key[0]}")

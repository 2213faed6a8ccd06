"""Lets processes go on after a restore of the line, from the history that they have seen to the one that the line has now.

The line was restored from an older copy and may have grown since. So both histories are equal up to some event, the common
event. The events that our processes saw behind it are gone, and so are the commands that they sent behind it. Commands and
events are appended in one order, so the restored log holds a prefix of both.

    1. Find the common event: a binary search over the events in process histories, each looked up by its position.
    2. A process that began behind it is undone. It begins anew if its first event is appended again.
    3. A process that began before and moved behind it runs again from its beginning, and its commands keep their ids. A
       command that is still in the log gets its first answer, so the process takes the same path. A command that is gone
       is carried out now.
    4. The log has no answer for a command that an operator cancelled, so the process would take another path. It is parked
       instead, its commands are given up, and an operator decides.

Killed anywhere, what is left? 2 to 4 and the checkpoint are one transaction. Two at once, or repeated: the second finds that
the checkpoint is no longer diverged. If the store is restored once more meanwhile, the runner diverges again.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from operator import itemgetter
from typing import LiteralString, NamedTuple

from foldline.v1.event_store_pb2 import EventEnvelope
from shared.folds.errors import Rejected, Unavailable
from shared.line.checkpoint import Checkpoint
from shared.line.follower import Line, LineAway
from shared.line.lookup import events_at
from shared.platform.packing import texts
from shared.platform.postgres import Connection
from shared.processes.records import Process, ProcessKey, ProcessStatus, WaitingInput
from shared.processes.round import Round

HISTORY_LOST = "HISTORY_LOST"
# The clocks of the line's database and of the processes' database may differ by this much.
MARGIN = timedelta(minutes=1)
TRANSACTION_S = 300

_KNOWN: LiteralString = (
    "SELECT DISTINCT position, id FROM process_history WHERE kind = 'event' AND position BETWEEN 1 AND %s ORDER BY position"
)
_MOVED: LiteralString = """
SELECT DISTINCT h.tenant, h.type, h.process_id FROM process_history h JOIN processes p USING (tenant, type, process_id)
WHERE p.status <> 'undone' AND (h.kind = 'event' AND h.position > %s OR h.kind <> 'operator' AND h.happened_at >= %s)
"""
_ENTRIES: LiteralString = """
SELECT h.tenant, h.type, h.process_id, h.kind, h.name, h.id, h.position, h.happened_at, h.error IS NULL
FROM unnest(%s::text[], %s::text[], %s::text[]) AS k (tenant, type, process_id)
JOIN process_history h ON h.tenant = k.tenant AND h.type = k.type AND h.process_id = k.process_id
WHERE h.kind IN ('event', 'answer', 'operator') ORDER BY h.number
"""
_FORGET: tuple[LiteralString, ...] = (
    """DELETE FROM process_commands c USING unnest(%s::text[], %s::text[], %s::text[]) AS k (tenant, type, process_id)
       WHERE c.tenant = k.tenant AND c.type = k.type AND c.process_id = k.process_id""",
    """DELETE FROM process_timers c USING unnest(%s::text[], %s::text[], %s::text[]) AS k (tenant, type, process_id)
       WHERE c.tenant = k.tenant AND c.type = k.type AND c.process_id = k.process_id""",
    """DELETE FROM process_inputs c USING unnest(%s::text[], %s::text[], %s::text[]) AS k (tenant, type, process_id)
       WHERE c.tenant = k.tenant AND c.type = k.type AND c.process_id = k.process_id""",
)
_GIVE_UP: LiteralString = """
UPDATE process_commands c SET given_up = true
FROM unnest(%s::text[], %s::text[], %s::text[]) AS k (tenant, type, process_id)
WHERE c.tenant = k.tenant AND c.type = k.type AND c.process_id = k.process_id
"""

ACCEPT_HISTORY = "accept-history"
"""The operator's action in a process's history; its note is the outcome."""
UNDONE, RESTARTED, PARKED = "undone", "restarted", "parked"
BEGIN = datetime(1970, 1, 1, tzinfo=UTC)


class Revised(NamedTuple):
    """The outcome for one process, and the event that began it if that event is gone."""

    key: ProcessKey
    outcome: str
    lost_event_id: str = ""
    lost_position: int = 0


class LostCommand(NamedTuple):
    """An accepted command that the restored log may lack, or certainly lacks."""

    key: ProcessKey
    command_id: str
    type: str
    certain: bool


@dataclass(frozen=True, slots=True)
class Common:
    """The last event that both histories have, and the head of the line now."""

    at: Checkpoint
    recorded_at: datetime
    head: int


@dataclass(frozen=True, slots=True)
class Revision:
    """The result of accepting the line's history."""

    before: Checkpoint
    common: Common
    processes: Sequence[Revised]
    commands: Sequence[LostCommand]


class _Entry(NamedTuple):
    kind: str
    name: str
    id: str
    position: int
    happened_at: datetime
    accepted: bool


@dataclass(slots=True)
class Findings:
    """The processes to revise and the events that they replay, read before the transaction."""

    common: Common
    entries: dict[ProcessKey, list[_Entry]] = field(default_factory=dict)
    events: dict[int, EventEnvelope] = field(default_factory=dict)


async def find(connection: Connection, line: Line, at: Checkpoint) -> Findings:
    """The common event and the processes that have moved behind it. Raises Unavailable if the store does not answer."""
    try:
        common = await _common(connection, line, at)
        found = Findings(common)
        cursor = await connection.execute(_MOVED, (common.at.position, common.recorded_at - MARGIN))
        moved: list[ProcessKey] = list(await cursor.fetchall())
        found.entries = {key: [] for key in moved}
        cursor = await connection.execute(_ENTRIES, _columns(moved))
        for tenant, type_, process_id, *entry in await cursor.fetchall():
            found.entries[tenant, type_, process_id].append(_Entry(*entry))
        wanted = {
            entry.position
            for entries in found.entries.values()
            for entry in entries
            if entry.kind == "event" and entry.position <= common.at.position
        }
        found.events = await events_at(line, wanted)
    except LineAway as error:
        raise Unavailable("EVENT_STORE_UNAVAILABLE", "the event store cannot be read now") from error
    return found


async def _common(connection: Connection, line: Line, at: Checkpoint) -> Common:
    epoch, head, _ = await _event(line, max(at.position, 1))
    cursor = await connection.execute(_KNOWN, (head,))
    known: list[tuple[int, str]] = list(await cursor.fetchall())
    if 0 < at.position <= head:
        known.append((at.position, at.event_id))
    known = sorted(set(known))
    low, high = 0, len(known)
    while low < high:
        middle = (low + high) // 2
        position, event_id = known[middle]
        _, _, event = await _event(line, position)
        if event is not None and event.event_id == event_id:
            low = middle + 1
        else:
            high = middle
    if low == 0:
        return Common(Checkpoint(epoch, 0, ""), BEGIN + MARGIN, head)
    position, event_id = known[low - 1]
    _, _, event = await _event(line, position)
    if event is None or event.event_id != event_id:
        raise LineAway("the line changes while it is read")
    return Common(Checkpoint(epoch, position, event_id), event.recorded_at.ToDatetime(UTC), head)


async def _event(line: Line, position: int) -> tuple[str, int, EventEnvelope | None]:
    """The line's epoch and head, and its event at a position."""
    async with aclosing(line.read(position, 1)) as pages:
        async for page in pages:
            return page.epoch, page.head, page.events[0] if page.events else None
    raise LineAway("the store answered nothing")


async def revise(connection: Connection, done: Round, found: Findings, user_id: str) -> tuple[list[Revised], list[LostCommand]]:
    """Undoes, restarts or parks the processes of `done`; the caller writes the round afterwards."""
    revised: list[Revised] = []
    commands: list[LostCommand] = []
    since = found.common.recorded_at - MARGIN
    for key, entries in found.entries.items():
        process = done.processes.get(key)
        if process is None:
            continue
        begin = next((entry for entry in entries if entry.kind == "event"), None)
        lost = begin is not None and begin.position > found.common.at.position
        if lost and begin is not None:
            revised.append(Revised(key, UNDONE, begin.id, begin.position))
        elif any(entry.kind == "operator" and entry.name in ("cancel", "skip") for entry in entries):
            revised.append(Revised(key, PARKED))
        else:
            revised.append(Revised(key, RESTARTED))
        commands += [
            LostCommand(key, entry.id, entry.name, lost)
            for entry in entries
            if entry.kind == "answer" and entry.accepted and (lost or entry.happened_at >= since)
        ]
    again = [it.key for it in revised if it.outcome != PARKED]
    for statement in _FORGET:
        await connection.execute(statement, _columns(again))
    await connection.execute(_GIVE_UP, _columns([it.key for it in revised if it.outcome == PARKED]))
    for it in revised:
        _revise(done, done.processes[it.key], it.outcome, found, user_id)
    return revised, commands


def _revise(done: Round, process: Process, outcome: str, found: Findings, user_id: str) -> None:
    done.operator(process, ACCEPT_HISTORY, user_id, note=outcome)
    if outcome == PARKED:
        process.attention = HISTORY_LOST
        if process.status != ProcessStatus.ENDED:
            process.trouble, process.status = process.trouble or HISTORY_LOST, ProcessStatus.PARKED
        return
    process.state, process.phase, process.trouble, process.attention = "", "", "", ""
    if outcome == UNDONE:
        process.status, process.attention, process.moved_at = ProcessStatus.UNDONE, HISTORY_LOST, done.now
        return
    process.status = ProcessStatus.RUNNING
    waiting = [
        WaitingInput(*process.key, "event", envelope.type, envelope.SerializeToString())
        for entry in found.entries[process.key]
        if entry.kind == "event" and (envelope := found.events.get(entry.position)) is not None
    ]
    done.replay(process, waiting)


def refuse_unless_diverged(diverged: bool) -> None:
    """Raises Rejected (NOT_DIVERGED)."""
    if not diverged:
        raise Rejected("NOT_DIVERGED", "what runs processes follows the line, or stopped for another reason: see its state")


def _columns(keys: Sequence[ProcessKey]) -> list[object]:
    return [texts(list(map(itemgetter(place), keys))) for place in range(3)]

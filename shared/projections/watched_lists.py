"""Live queries of lists: the rows that pass a filter, then what enters, changes and leaves.

Those who watch the same filter share a query. It holds the id of each row in the list and a digest of what was shown, no more
than ROWS_MAX of them. All queries of a summary are at one place of the ring of changes (`changes`): in one transaction the rows
that changed behind the place are read, once for each tenant that watches, and each query's conditions are held against them in
memory. So a commit costs as much as it changes rows of tenants that watch. A query that somebody joins is read whole, and so are
all after a change that does not name its rows; meanwhile it stays at its place. That is done beside the rest, for LOADS_MAX
queries at a time, each with its own connection and LOAD_MAX_S: one that is slow or fails ends its own watches and no others.

A watcher holds what it has not been told, one change for each row: no more than it has been shown and the list has now. A
resume token has the place and the sum of the digests. Whoever goes on with it is told the rows that changed behind the place; if
the ring does not hold those any more and the sum is another, the list begins anew.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager
from typing import NamedTuple, Protocol

from shared.folds.errors import Refusal, Unavailable
from shared.folds.summary import Condition
from shared.line.consistency import ConsistencyGate, Token, packed, unpacked
from shared.platform.postgres import Connection, Reads
from shared.platform.seal import NotOurs, Seal
from shared.platform.telemetry import logger
from shared.projections import changes, resume
from shared.projections.changes import Place, RowId
from shared.projections.watched_list import ROWS_MAX, Begin, Change, Found, ListWatcher, Query, too_long

PURPOSE = "foldline.resume-token-of-a-list.1"
CONTENT = struct.Struct(">qQ36s")
"""Of a resume token: number and mark of the last change, and the sum of the digests; the place of the line follows."""
LOADS_MAX = 3
"""So many queries are read whole at once, and for each so many of those who join it are begun."""
LOAD_MAX_S = 1.0
"""For the query of one list."""
JOINING_MAX = 32
READ_MAX = 500
ANSWER_BYTES = 256 * 1024

log = logger(__name__)


class Source(Protocol):
    """Reads rows in an open transaction."""

    async def rows(self, connection: Connection, tenant: str, ids: Collection[str]) -> Sequence[Found]:
        """The rows of a tenant with these ids."""

    async def listed(
        self, connection: Connection, tenant: str, conditions: Sequence[Condition], order: str, limit: int
    ) -> Sequence[Found]:
        """The first rows of a tenant that meet all conditions, in an order that an index gives."""


class Lists:
    """All who watch lists of one summary in this process. The poller of `watch` calls `follow`."""

    def __init__(
        self,
        reads: Reads,
        group: str,
        shard: int,
        source: Source,
        count: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        """`count` counts a query of a tenant while it lasts, and may refuse it."""
        self._reads = reads
        self._group = group
        self._shard = shard
        self._source = source
        self._count = count
        self._queries: dict[tuple[str, str], Query] = {}
        self._counted: dict[Query, ExitStack] = {}
        self._due: dict[Query, None] = {}
        self._loads: dict[Query, asyncio.Task[_Load]] = {}
        self.place = Place(0, "", Token(0, "", 0))
        self.rows_read = 0
        """How many changed rows have been read for those who watch."""

    def __bool__(self) -> bool:
        return bool(self._queries)

    @property
    def waits(self) -> bool:
        """Whether a query has to be read whole."""
        return bool(self._due)

    @asynccontextmanager
    async def watching(
        self, tenant: str, key: str, conditions: Sequence[Condition], begin: Begin | None, order: str = ""
    ) -> AsyncIterator[ListWatcher]:
        """A watcher of the rows that meet the conditions, which `key` names. Raises OverLimit TOO_MANY_WATCHES.

        `order` is one in which an index gives the rows.
        """
        query = self._queries.get((tenant, key))
        if query is None:
            counted = ExitStack()
            counted.enter_context(self._count(tenant))
            query = self._queries[tenant, key] = Query(tenant, conditions, order, lambda: self.place)
            self._counted[query] = counted
        watcher = ListWatcher(query, begin)
        query.joining.append(watcher)
        self._read_whole(query)
        try:
            yield watcher
        finally:
            query.watchers.discard(watcher)
            if watcher in query.joining:
                query.joining.remove(watcher)
            if not (query.watchers or query.joining):
                del self._queries[tenant, key]
                self._due.pop(query, None)
                if query in self._loads:
                    self._loads.pop(query).cancel()
                self._counted.pop(query).close()

    def end(self, why: Refusal) -> None:
        """Ends all watches."""
        for query in self._queries.values():
            query.fail(why)

    async def follow(self) -> None:
        """Tells what has changed since the last time, and begins the queries that have been read. Raises Unavailable."""
        self._start_loads()
        loads = self._loads_done()
        following = [query for query in self._queries.values() if query not in self._due]
        read: dict[str, dict[str, Found | None]] = {}
        async with self._reads.connection() as connection, connection.transaction():
            # Everything that is read is as of one moment.
            await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            place = await changes.place(connection, self._group, self._shard)
            _, changed = await changes.since(connection, self._group, self._shard, self.place.seq)
            for tenant, ids in _by_tenant(changed or (), {query.tenant for query in following}).items():
                read[tenant] = await self._rows(connection, tenant, ids)
            loads = [caught_up for load in loads if (caught_up := await self._caught_up(connection, load)) is not None]
        if changed is None:
            for query in following:
                self._read_whole(query)
            following = []
        self.place = place
        for query in following:
            if query.held_at is None:  # else somebody has joined meanwhile
                for id_, found in read.get(query.tenant, {}).items():
                    query.set(id_, found if found is not None and query.takes(found) else None)
        for load in loads:
            self._loaded(load)

    async def _rows(self, connection: Connection, tenant: str, ids: Sequence[str]) -> dict[str, Found | None]:
        found: dict[str, Found | None] = dict.fromkeys(ids)
        for begin in range(0, len(ids), READ_MAX):
            part = ids[begin : begin + READ_MAX]
            self.rows_read += len(part)
            found.update((it.id, it) for it in await self._source.rows(connection, tenant, part))
        return found

    def _start_loads(self) -> None:
        for query in self._due:
            if len(self._loads) == LOADS_MAX:
                return
            if query not in self._loads:
                self._loads[query] = task = asyncio.create_task(self._load(query))
                task.add_done_callback(lambda task: task.cancelled() or task.exception())  # noted, should nobody be there to ask

    def _loads_done(self) -> list[_Load]:
        """The queries that have been read. Those that could not be read are ended."""
        done = []
        for query, task in [(query, task) for query, task in self._loads.items() if task.done()]:
            del self._loads[query]
            error = None if task.cancelled() else task.exception()
            if error is None and not task.cancelled():
                # Who joins later than this may have seen more than the transaction that is about to begin.
                done.append(task.result()._replace(joining=query.joining[:JOINING_MAX]))
                continue
            if not isinstance(error, Refusal):
                log.error("watched_list_failed", exc_info=error)
                error = Unavailable("WATCH_ENDED", "the watch had to end; go on with the last resume token")
            self._fail(query, error)
        return done

    async def _load(self, query: Query) -> _Load:
        async with self._reads.connection() as connection, connection.transaction():
            await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            await connection.execute("SELECT set_config('statement_timeout', %s, true)", [f"{LOAD_MAX_S * 1000:.0f}"])
            place = await changes.place(connection, self._group, self._shard)
            found = await self._source.listed(connection, query.tenant, query.conditions, query.order, ROWS_MAX + 1)
        return _Load(query, place, {it.id: it for it in found}, [], {})

    async def _caught_up(self, connection: Connection, load: _Load) -> _Load | None:
        """What was read, as of the open transaction. None if that is not known: then the query is read again."""
        query, found = load.query, dict(load.found)
        if len(found) <= ROWS_MAX:
            _, changed = await changes.since(connection, self._group, self._shard, load.place.seq)
            if changed is None:
                return None
            ids = [id_ for tenant, id_ in changed if tenant == query.tenant]
            for id_, it in (await self._rows(connection, query.tenant, ids)).items():
                if it is not None and query.takes(it):
                    found[id_] = it
                else:
                    found.pop(id_, None)
        begins = {watcher.begin.place for watcher in load.joining if watcher.begin is not None}
        behind = {begin: await changes.of_tenant(connection, self._group, query.tenant, begin) for begin in begins}
        return load._replace(found=found, behind=behind)

    def _loaded(self, load: _Load) -> None:
        query = load.query
        if query not in self._due:  # all who watched are gone
            return
        if len(load.found) > ROWS_MAX:
            self._fail(query, too_long())
            return
        found = load.found
        query.set_all(found)
        query.held_at = None
        for watcher in load.joining:
            if watcher in query.joining:
                query.joining.remove(watcher)
                query.watchers.add(watcher)
                watcher.start(found, None if watcher.begin is None else load.behind[watcher.begin.place])
        del self._due[query]
        if query.joining:
            self._read_whole(query)

    def _fail(self, query: Query, why: Refusal) -> None:
        self._due.pop(query, None)
        query.fail(why)

    def _read_whole(self, query: Query) -> None:
        query.held_at = query.held_at or self.place
        self._due[query] = None


class _Load(NamedTuple):
    """A query as it was read whole, who is begun with it, and what changed behind their places."""

    query: Query
    place: Place
    found: Mapping[str, Found]
    joining: list[ListWatcher]
    behind: dict[Place, set[str] | None]


async def serve(
    lists: Lists,
    gate: ConsistencyGate,
    query: tuple[str, str, Sequence[Condition], str],
    tokens: tuple[str, str],
    write: Callable[[Sequence[tuple[str, Change]], bool, str], Awaitable[None]],
    started: Callable[[], Awaitable[None]],
) -> None:
    """Writes a list as it is and as it changes, until an exception. `query`: tenant, key, conditions and order.

    `tokens`: to resume, and of consistency. `write` sends changes, whether the list begins anew with them, and a resume token;
    `started` lets the poller run. Raises Invalid RESUME_TOKEN_INVALID, what the gate raises, OverLimit LIST_TOO_LONG,
    TOO_MANY_WATCHES and WATCH_TOO_SLOW, Unavailable.
    """
    tenant, key, conditions, order = query
    begin = None
    if tokens[0]:
        begin = decode(gate.seal, tenant, key, tokens[0])
        await gate.reach(begin.place.at, resume.WAIT_MAX_S)
    await gate.wait(tokens[1], tenant, resume.WAIT_MAX_S)
    async with lists.watching(tenant, key, conditions, begin, order) as watcher:
        await started()
        while True:
            answer = await watcher.next(resume.HEARTBEAT_S)
            token = encode(gate.seal, tenant, key, answer.begin)
            anew = answer.begins_anew
            for part, last in _parts(answer.changes):
                await resume.in_time(write(part, anew, token if last else ""))
                anew = False


def encode(seal: Seal, tenant: str, key: str, begin: Begin) -> str:
    """The token to go on behind what the caller has of a list."""
    place = begin.place
    content = CONTENT.pack(place.seq, begin.total, place.mark.encode()) + packed(place.at)
    return seal.seal(content, PURPOSE, tenant, key)


def decode(seal: Seal, tenant: str, key: str, token: str) -> Begin:
    """Where a resume token goes on. Raises Invalid for one that was not made for this list."""
    try:
        content = seal.open(token, PURPOSE, tenant, key)
    except NotOurs:
        raise resume.invalid("this list") from None
    seq, total, mark = CONTENT.unpack_from(content)
    return Begin(Place(seq, mark.rstrip(b"\0").decode(), unpacked(content[CONTENT.size :])), total)


def _by_tenant(changed: Collection[RowId], tenants: Collection[str]) -> dict[str, list[str]]:
    ids: dict[str, list[str]] = {}
    for tenant, id_ in changed:
        if tenant in tenants:
            ids.setdefault(tenant, []).append(id_)
    return ids


def _parts(told: Mapping[str, Change]) -> list[tuple[list[tuple[str, Change]], bool]]:
    """The changes in answers of about ANSWER_BYTES, and whether each is the last; one without changes if there are none."""
    parts: list[list[tuple[str, Change]]] = [[]]
    size = 0
    for item in told.items():
        size += 64 + (0 if item[1].message is None else item[1].message.ByteSize())
        if size > ANSWER_BYTES and parts[-1]:
            parts.append([])
            size = 0
        parts[-1].append(item)
    return [(part, nth == len(parts)) for nth, part in enumerate(parts, 1)]

"""Live queries: a row as it is now, then again whenever it changes.

One poller for each summary reads which rows the projector changed (`changes`) while somebody watches, reads those of them that
are watched, once for all who watch them, and gives each watcher the newest state. A watcher holds that one state: a reader that
is slow gets fewer of them, none older than the last, and one that takes nothing for WRITE_S is cut off. So a watcher takes the
same memory however fast the row changes, and a commit costs as much as it changes rows that somebody watches. After one that does
not name its rows, or too many of them to be kept, every watched row is read, four times a second at most.

A resume token has the position of the line up to which the row was shown, and a digest of what was shown. Whoever goes on with
it, at any instance and after any restart or rebuild, first waits until the tables are that far; then the row is shown if it is
not what was shown last. So no state is shown twice and none is older than the one before.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager

from google.protobuf.message import Message
from msgspec import Struct

from shared.folds.errors import OverLimit, Refusal, Unavailable
from shared.line.consistency import ConsistencyGate, Token, packed, unpacked
from shared.platform.postgres import Reads
from shared.platform.seal import NotOurs, Seal
from shared.platform.telemetry import logger
from shared.projections import changes, resume
from shared.projections.changes import RowId
from shared.projections.watched_lists import Lists, Source

PURPOSE = "foldline.resume-token.1"
DIGEST_CHARACTERS = 16
POLL_MIN_S, POLL_MAX_S = 0.01, 0.05
ALL_READ_S = 0.25
"""The pause after every watched row had to be read, because the change does not name its rows."""
ROWS_MAX = 500
"""So many rows are read at once."""

log = logger(__name__)


class Shown(Struct, frozen=True):
    """A row's message as of a change of its group: `seq` orders them, `at` is the place of the line."""

    seq: int
    at: Token
    message: Message
    digest: str


Read = Callable[[str, Collection[str]], Awaitable[dict[str, Shown]]]
"""The rows of a tenant that have these ids, by id."""


class WatchLimits:
    """How many watches there may be at once in this process: of each tenant, and in all. Or of what `noun` says."""

    def __init__(self, tenant_max: int, total_max: int, noun: str = "watches") -> None:
        self._tenant_max = tenant_max
        self._total_max = total_max
        self._noun = noun
        self.by_tenant: Counter[str] = Counter()

    @contextmanager
    def taken(self, tenant: str) -> Iterator[None]:
        """Counts a watch while it lasts. Raises OverLimit TOO_MANY_WATCHES."""
        if self.by_tenant[tenant] >= self._tenant_max:
            raise OverLimit(
                "TOO_MANY_WATCHES", f"a tenant may have {self._tenant_max} {self._noun} at one instance", retry_after_s=1.0
            )
        if self.by_tenant.total() >= self._total_max:
            raise OverLimit("TOO_MANY_WATCHES", f"this instance serves {self._total_max} {self._noun}", retry_after_s=1.0)
        self.by_tenant[tenant] += 1
        try:
            yield
        finally:
            self.by_tenant[tenant] -= 1
            if not self.by_tenant[tenant]:
                del self.by_tenant[tenant]


class Watcher:
    """One who watches a row: the newest state that it has not been shown."""

    def __init__(self) -> None:
        self.state: Shown | None = None
        self.failure: Refusal | None = None
        self._news = asyncio.Event()

    def tell(self, state: Shown | None, failure: Refusal | None = None) -> None:
        """Gives it a newer state, or why there will be none."""
        self.state, self.failure = state or self.state, failure or self.failure
        self._news.set()

    async def next(self, timeout_s: float) -> Shown | None:
        """The newest state, as soon as there is one; None after the time. Raises the failure."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._news.wait()
        except TimeoutError:
            return None
        self._news.clear()
        if self.failure is not None:
            raise self.failure
        state, self.state = self.state, None
        return state


class Watches:
    """All who watch rows and lists of one summary in this process, and the poller that serves them."""

    def __init__(self, reads: Reads, group: str, shard: int, read: Read, source: Source, lists: WatchLimits) -> None:
        """`read` and `source` read rows; `lists` limits how many lists are watched."""
        self.lists = Lists(reads, group, shard, source, lists.taken)
        self._reads = reads
        self._group = group
        self._shard = shard
        self._read = read
        self._watchers: dict[RowId, set[Watcher]] = {}
        self._poller: asyncio.Task[None] | None = None
        self._ready: asyncio.Event = asyncio.Event()
        self.rows_read = 0
        """How many rows have been read for those who watch."""

    @asynccontextmanager
    async def watching(self, row: RowId) -> AsyncIterator[Watcher]:
        """A watcher that is told of every change that is committed from now on. Raises Unavailable."""
        watcher = Watcher()
        self._watchers.setdefault(row, set()).add(watcher)
        try:
            await self.started()
            if watcher.failure is not None:
                raise watcher.failure
            yield watcher
        finally:
            watchers = self._watchers[row]
            watchers.discard(watcher)
            if not watchers:
                del self._watchers[row]

    async def started(self) -> None:
        """Lets the poller run; returns when it knows where the changes begin, or has ended."""
        if self._poller is None or self._poller.done():
            self._ready = asyncio.Event()
            self._poller = asyncio.create_task(self._poll(self._ready))
        await self._ready.wait()

    def end(self, why: Refusal) -> None:
        """Ends all watches."""
        self.lists.end(why)
        for watchers in self._watchers.values():
            for watcher in watchers:
                watcher.tell(None, why)

    async def _poll(self, ready: asyncio.Event) -> None:
        try:
            async with self._reads.connection() as connection:
                seq = await changes.head(connection, self._group, self._shard)
            ready.set()
            pause_s = POLL_MIN_S
            while self._watchers or self.lists:
                async with self._reads.connection() as connection:
                    before = seq
                    seq, changed = await changes.since(connection, self._group, self._shard, seq)
                if seq != before:
                    wanted = self._watchers if changed is None else changed & self._watchers.keys()
                    await self._tell(set(wanted))
                if self.lists and (self.lists.waits or seq != self.lists.place.seq):
                    await self.lists.follow()
                pause_s = POLL_MIN_S if seq != before else min(pause_s * 1.2, POLL_MAX_S)
                await asyncio.sleep(pause_s if changed is not None else ALL_READ_S)
        except Refusal as error:
            self.end(error)
        except Exception:
            log.exception("watches_ended")
            self.end(Unavailable("WATCH_ENDED", "the watch had to end; go on with the last resume token"))
        finally:
            ready.set()

    async def _tell(self, rows: set[RowId]) -> None:
        ids: dict[str, list[str]] = {}
        for tenant, id_ in rows:
            ids.setdefault(tenant, []).append(id_)
        for tenant, wanted in ids.items():
            for begin in range(0, len(wanted), ROWS_MAX):
                part = wanted[begin : begin + ROWS_MAX]
                self.rows_read += len(part)
                for id_, state in (await self._read(tenant, part)).items():
                    for watcher in self._watchers.get((tenant, id_), ()):
                        watcher.tell(state)


async def serve(
    watches: Watches,
    gate: ConsistencyGate,
    row: RowId,
    first: Callable[[], Awaitable[Shown]],
    tokens: tuple[str, str],
    write: Callable[[Message | None, str], Awaitable[None]],
) -> None:
    """Writes a row as it is and as it changes, until an exception. `tokens`: to resume, and of consistency.

    `first` reads the row and raises NotFound; `write` sends a message, or a heartbeat if that is None, with a resume token.
    Raises Invalid RESUME_TOKEN_INVALID, what the gate raises, OverLimit WATCH_TOO_SLOW, Unavailable.
    """
    token, consistent = tokens
    digest = ""
    if token:
        place, digest = decode(gate.seal, row, token)
        await gate.reach(place, resume.WAIT_MAX_S)
    await gate.wait(consistent, row[0], resume.WAIT_MAX_S)
    async with watches.watching(row) as watcher:
        seq = -1
        state: Shown | None = await first()
        while True:
            if state is None:
                await resume.in_time(write(None, token))
            elif state.seq > seq and state.digest != digest:
                seq, digest, token = state.seq, state.digest, encode(gate.seal, row, state)
                await resume.in_time(write(state.message, token))
            elif seq < 0:  # as it was shown before: the caller learns at once that it is followed
                seq = state.seq
                await resume.in_time(write(None, token))
            state = await watcher.next(resume.HEARTBEAT_S)


def digest_of(message: Message) -> str:
    """What tells a message from the one before."""
    return hashlib.sha256(message.SerializeToString(deterministic=True)).hexdigest()[:DIGEST_CHARACTERS]


def encode(seal: Seal, row: RowId, state: Shown) -> str:
    """The token to go on behind this state of the row."""
    return seal.seal(state.digest.encode() + packed(state.at), PURPOSE, *row)


def decode(seal: Seal, row: RowId, token: str) -> tuple[Token, str]:
    """The place and the digest of a resume token. Raises Invalid for one that was not made for this row."""
    try:
        content = seal.open(token, PURPOSE, *row)
    except NotOurs:
        raise resume.invalid("this row") from None
    return unpacked(content[DIGEST_CHARACTERS:]), content[:DIGEST_CHARACTERS].decode()

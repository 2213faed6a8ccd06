"""Read your own writes: a token holds a position of the line, and a query waits until its tables have reached it.

A token comes from a command's receipt. It names a shard, the epoch of its history and a position, sealed for the caller's
tenant: positions are of all tenants together, and would tell each how much the others do. One that the tables cannot reach in
the call's time is refused at once: a query that waits holds a place. The refusal says whether it helps to ask again later:
NOT_YET_CONSISTENT, and when; only once the tables follow the token's history, TOKEN_OF_ANOTHER_HISTORY; not, TOKEN_UNREACHABLE.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Awaitable, Callable, Sequence

from msgspec import Struct

from shared.folds.errors import Invalid, Rejected, Unavailable
from shared.platform.seal import NotOurs, Seal

PURPOSE = "foldline.consistency-token.1"
PLACES = "foldline.places.1"
PLACE = struct.Struct(">iq")
"""Shard and position, of one length whatever they are; the epoch follows."""
PLACES_CHARACTERS_MAX = 64 * 1024
POLL_S = 0.002
POLL_MAX_S = 0.02
FRESH_S = 1.0
"""How long a checkpoint that was read may be used. Later the tables may turn out to follow a history that is lost."""
EVENTS_A_SECOND_MAX = 100_000
"""No tables follow the line faster: a position that is further away than that is not waited for."""
UNREACHABLE_S = 24 * 3600
"""Not even tables that are filled anew lack so much: a position that is further away at EVENTS_A_SECOND_MAX is of no line."""
ASK_AGAIN_S = 0.1
MARGIN_S = 0.1
"""A wait ends this long before the call's deadline (or a tenth of it, if that is less), so that the answer arrives in time."""


class Token(Struct, frozen=True):
    """A place in the line of a shard: every event up to `position` of the history `epoch`."""

    shard: int
    epoch: str
    position: int


class Reached(Struct, frozen=True):
    """The events in the tables: all up to `position` of `epoch`. `diverged`: the store has lost that history."""

    epoch: str
    position: int
    diverged: bool = False


def packed(token: Token) -> bytes:
    """The token as bytes, whose length tells nothing of it but the epoch's."""
    return PLACE.pack(token.shard, token.position) + token.epoch.encode()


def unpacked(content: bytes) -> Token:
    """The token that `packed` made these bytes of."""
    shard, position = PLACE.unpack_from(content)
    return Token(shard, content[PLACE.size :].decode(), position)


def encode(token: Token, seal: Seal, tenant: str) -> str:
    """The token as clients of a tenant see it."""
    return seal.seal(packed(token), PURPOSE, tenant)


def decode(text: str, seal: Seal, tenant: str, *, field: str = "consistency_token") -> Token:
    """The token of a tenant's request, from its `field`. Raises Invalid for text that `encode` did not make for that tenant."""
    try:
        return unpacked(seal.open(text, PURPOSE, tenant))
    except NotOurs:
        raise Invalid(
            "CONSISTENCY_TOKEN_MALFORMED",
            "the consistency token is not one of ours for this tenant",
            violations=((field, "must be the token of a receipt of this tenant, unchanged"),),
        ) from None


def encode_places(epoch: str, positions: Sequence[int], seal: Seal, tenant: str) -> str:
    """Positions of a history, for another of our services that is asked by the same tenant; the tenant cannot read them."""
    history = epoch.encode()
    return seal.seal(struct.pack(f">I{len(positions)}q", len(positions), *positions) + history, PLACES, tenant)


def decode_places(text: str, seal: Seal, tenant: str) -> tuple[str, Sequence[int]]:
    """The epoch and positions that `encode_places` sealed. Raises NotOurs."""
    content = seal.open(text, PLACES, tenant, characters_max=PLACES_CHARACTERS_MAX)
    (count,) = struct.unpack_from(">I", content)
    positions = struct.unpack_from(f">{count}q", content, 4)
    return content[4 + 8 * count :].decode(), positions


def same_history(token_epoch: str, epoch: str) -> bool:
    """Whether tables of `epoch` can hold the token's event: not those of another history, nor of a later timeline.

    Tables that have seen no event yet, whose epoch is empty, can follow any history.
    """
    if not epoch:
        return True
    token_id, _, token_timeline = token_epoch.partition("/")
    history_id, _, timeline = epoch.partition("/")
    return token_id == history_id and token_timeline.isdigit() and timeline.isdigit() and int(timeline) <= int(token_timeline)


def _rounded(lag: int) -> int:
    """A lag as callers are told it, up to the next power of two: exact, it would count what all other tenants do."""
    return 1 << (lag - 1).bit_length() if lag > 0 else 0


class ConsistencyGate:
    """Lets queries wait for the checkpoint of their tables. One poller serves all of them, and runs only while one waits.

    `progress` reads the checkpoint: its epoch and position, and whether the tables follow a history that is lost.
    """

    def __init__(
        self,
        shard: int,
        progress: Callable[[], Awaitable[Reached]],
        seal: Seal,
        *,
        wait_max_s: float,
        read_max_s: float = 5.0,
    ) -> None:
        """`wait_max_s` is for calls without a deadline. A read of the checkpoint that takes `read_max_s` counts as failed."""
        self._shard = shard
        self._progress = progress
        self.seal = seal
        self._wait_max_s = wait_max_s
        self._read_max_s = read_max_s
        self._seen = Reached("", 0)
        self._seen_at = -FRESH_S
        self._waiting = 0
        self._moved = asyncio.Event()
        self._poller: asyncio.Task[None] | None = None
        self._failure: Exception | None = None

    async def wait(self, text: str, tenant: str, remaining_s: float | None) -> None:
        """Returns when the tables have reached the position of a tenant's token; at once for an empty text.

        Raises Invalid for a malformed token and what `reach` raises.
        """
        if text:
            await self.reach(decode(text, self.seal, tenant), remaining_s)

    async def reach(self, token: Token, remaining_s: float | None) -> None:
        """Returns when the tables have reached the token's position.

        Raises Rejected NOT_YET_CONSISTENT, with the lag in events, rounded up, when the call's deadline is near
        (`remaining_s` from now), or at once if the tables cannot be there by then. Raises at once, for tokens that the tables
        will never reach, Rejected HISTORY_DIVERGED, TOKEN_OF_ANOTHER_HISTORY or TOKEN_UNREACHABLE, and Invalid if it is of
        another shard.
        """
        if token.shard != self._shard:
            raise Invalid(
                "CONSISTENCY_TOKEN_OF_ANOTHER_SHARD",
                "the consistency token is of another shard",
                violations=(("consistency_token", f"is of shard {token.shard}, this is shard {self._shard}"),),
            )
        if time.monotonic() - self._seen_at < FRESH_S and self._reached(token):
            return
        budget_s = self._wait_max_s if remaining_s is None else max(remaining_s, 0.0)
        deadline = time.monotonic() + budget_s - min(MARGIN_S, budget_s / 10)
        self._waiting += 1
        try:
            await self._until_reached(token, deadline)
        finally:
            self._waiting -= 1

    def _reached(self, token: Token) -> bool:
        seen = self._seen
        return not seen.diverged and seen.position >= token.position and seen.epoch == token.epoch

    async def _until_reached(self, token: Token, deadline: float) -> None:
        while True:
            if self._poller is None or self._poller.done():
                self._failure, self._poller = None, asyncio.create_task(self._poll())
                self._poller.add_done_callback(self._ended)
            moved, left_s = self._moved, deadline - time.monotonic()
            try:
                async with asyncio.timeout(max(left_s, 0.0)):
                    await moved.wait()
            except TimeoutError:
                raise self._not_yet(token) from None
            if self._reached(token):
                return
            if isinstance(self._failure, Unavailable):
                raise self._failure
            if self._failure is not None:
                raise Unavailable("DATABASE_UNAVAILABLE", "the query tables cannot be read now") from self._failure
            if self._seen.diverged:
                raise Rejected(
                    "HISTORY_DIVERGED",
                    "the query tables are of a history that the event store has lost; an operator must let them go on",
                )
            if (refusal := self._never(token)) is not None:
                raise refusal
            if self._lag(token) > EVENTS_A_SECOND_MAX * max(deadline - time.monotonic(), 1.0):
                raise self._not_yet(token)

    async def _poll(self) -> None:
        """Reads the checkpoint repeatedly while a query waits, less often each time that it has not moved."""
        pause_s = POLL_S
        while self._waiting:
            before, failed_before = self._seen, self._failure is not None
            try:
                async with asyncio.timeout(self._read_max_s):
                    self._seen, self._failure = await self._progress(), None
                self._seen_at = time.monotonic()
            except Exception as error:  # noqa: BLE001 (told to every waiter)
                self._failure = error
            if self._failure is not None or failed_before or self._seen != before:
                pause_s = POLL_S
            self._wake()
            if self._failure is not None:
                return
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 1.1, POLL_MAX_S)

    def _ended(self, poller: asyncio.Task[None]) -> None:
        """However the poller ends, no query waits for it afterwards; those of the next one wait for what that reads."""
        if poller is self._poller:
            self._wake()

    def _wake(self) -> None:
        self._moved.set()
        self._moved = asyncio.Event()

    def _lag(self, token: Token) -> int:
        """How many events the tables lack."""
        return token.position - self._seen.position

    def _never(self, token: Token) -> Rejected | None:
        """Why the tables will not reach the token as long as they follow their history; None if they may.

        A token of another history can also be newer than theirs: the write database was replaced, and they have not noticed yet.
        They will not follow it before an operator lets them, so it is not waited for, and there is no time to ask again after.
        """
        if not same_history(token.epoch, self._seen.epoch):
            return Rejected(
                "TOKEN_OF_ANOTHER_HISTORY",
                "the token is of another history than these tables follow now: ask without it, or again if they follow that one",
            )
        if self._lag(token) > EVENTS_A_SECOND_MAX * UNREACHABLE_S:
            return Rejected("TOKEN_UNREACHABLE", "the token is further ahead than the line can have come: ask without it")
        return None

    def _not_yet(self, token: Token) -> Rejected:
        """The refusal of a token that the tables have not reached in time, with how long they take at the least."""
        lag = _rounded(self._lag(token))
        return Rejected(
            "NOT_YET_CONSISTENT",
            "the query tables have not followed the line that far yet; ask again",
            retry_after_s=max(ASK_AGAIN_S, lag / EVENTS_A_SECOND_MAX),
            lag=lag,
        )

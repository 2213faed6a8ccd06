"""How many calls are served at once, and whose: no caller takes the places of all others.

Tenants share. One alone may use all places; of two each has half. When all are taken, a tenant that has less than its share
gets the place of the oldest call of the tenant that has most, which is answered CALL_GAVE_WAY. Processes and operators have
places of their own beside these, and so have health checks and reflection, which need no token.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from msgspec import Struct

from shared.folds.errors import Late, OverLimit, Refusal, Unavailable
from shared.platform.identity import Identity, Role
from shared.platform.shares import Shares
from shared.platform.telemetry import logger

REQUEST_WITHIN_S = 5.0
"""How long a call may hold a place before its request has come."""
OPEN_CALLS_MAX = 64
"""Calls of health and reflection at once; when one more comes, the oldest ends."""
OPEN_CALL_S_MAX = 300.0
"""How long one of those may take: a watcher of health asks again."""

_OWN_ROLES = frozenset({Role.PROCESS, Role.READER, Role.OPERATOR})
_OWN_SHARE = 10
_OWN_MIN = 10
_OVERDUE_EVERY_S = 0.5
_WARN_EVERY_S = 1.0

log = logger(__name__)


class Place(Struct, eq=False):
    """What one call holds while it is served."""

    task: asyncio.Task[object]
    tenant: str
    since: float
    # Why the call was ended to make room, or because it held its place for nothing.
    refusal: Refusal | None = None

    def end(self, refusal: Refusal) -> None:
        """Cancels the call; it is answered with `refusal`."""
        self.refusal = refusal
        self.task.cancel()

    def answer(self, error: BaseException | None) -> Refusal | None:
        """What to answer if the call was ended by us and by nobody else; None if it was not."""
        if self.refusal is None or not isinstance(error, asyncio.CancelledError):
            return None
        return self.refusal if self.task.uncancel() == 0 else None


class Places:
    """The places of calls with a token."""

    def __init__(self, total: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`total` is for the tenants' users; a tenth as many, 10 at least, are kept beside them for our own processes."""
        self._clock = clock
        self._own_left = max(total // _OWN_SHARE, _OWN_MIN)
        self._shares: Shares[Place] = Shares(total)
        self._without_request: dict[Place, None] = {}
        self._warned_at = -_WARN_EVERY_S

    def take(self, identity: Identity) -> Place:
        """A place for a call of the current task. Raises OverLimit (TOO_MANY_CALLS) if there is none for this caller."""
        task = asyncio.current_task()
        assert task is not None  # gRPC serves each call in one
        own = not _OWN_ROLES.isdisjoint(identity.roles)
        place = Place(task, "" if own else identity.tenant, self._clock())
        if own:
            if not self._own_left:
                raise self._none_left(identity.tenant)
            self._own_left -= 1
        else:
            self._make_room(identity.tenant)
            self._shares.take(identity.tenant, place)
        return place

    def give_back(self, place: Place) -> None:
        """Frees a place. One that was taken away is free already."""
        self._without_request.pop(place, None)
        if not place.tenant:
            self._own_left += 1
            return
        self._shares.give_back(place.tenant, place)

    def awaits_request(self, place: Place) -> None:
        """Notes that the call's request has not come yet, which it must within REQUEST_WITHIN_S."""
        self._without_request[place] = None

    def has_request(self, place: Place) -> None:
        """Notes that the request has come."""
        self._without_request.pop(place, None)

    async def end_overdue(self) -> None:
        """Ends calls whose requests do not come (REQUEST_OVERDUE), until cancelled."""
        while True:
            await asyncio.sleep(_OVERDUE_EVERY_S)
            overdue = self._clock() - REQUEST_WITHIN_S
            while (place := next(iter(self._without_request), None)) is not None and place.since < overdue:
                del self._without_request[place]
                place.end(Late("REQUEST_OVERDUE", f"no request has come within {REQUEST_WITHIN_S:.0f} s"))

    def _make_room(self, tenant: str) -> None:
        if not self._shares.may_have(tenant):
            raise self._none_left(tenant)
        if not self._shares.full:
            return
        _, places = self._shares.most()
        oldest = next(iter(places))
        self.give_back(oldest)
        text = "this call gave way to one of another tenant; it may still have happened"
        oldest.end(OverLimit("CALL_GAVE_WAY", text, retry_after_s=0.5))

    def _none_left(self, tenant: str) -> Refusal:
        if (now := self._clock()) - self._warned_at >= _WARN_EVERY_S:
            self._warned_at = now
            log.warning("too_many_calls", tenant=tenant, calls=len(self._shares))
        return OverLimit("TOO_MANY_CALLS", "this instance serves as many of your calls as it takes on", retry_after_s=0.5)


class OpenPlaces:
    """The few places of calls that need no token. The oldest gives way, so a new check of health is always served."""

    def __init__(self, total: int = OPEN_CALLS_MAX) -> None:
        self._total = total
        self._taken: dict[Place, None] = {}

    def take(self) -> Place:
        """A place for a call of the current task."""
        if len(self._taken) >= self._total:
            oldest = next(iter(self._taken))
            del self._taken[oldest]
            oldest.end(Unavailable("CALL_GAVE_WAY", "calls without a token are few at once, and this was the oldest: ask again"))
        task = asyncio.current_task()
        assert task is not None
        place = Place(task, "", time.monotonic())
        self._taken[place] = None
        return place

    def give_back(self, place: Place) -> None:
        """Frees a place. One that was taken away is free already."""
        self._taken.pop(place, None)

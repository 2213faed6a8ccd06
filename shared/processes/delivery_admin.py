"""What operators see of deliveries, and what they can do with one: retry, discard.

An operator's action locks the sender's checkpoint row, so it never runs during a claim, and any instance may serve it.
Repeated: the second action finds the delivery as the first left it, and changes nothing or is refused by name.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from uuid import UUID

from shared.folds.delivery import Announcements
from shared.folds.errors import NotFound, Rejected
from shared.platform.postgres import Connection, Reads
from shared.processes import announce
from shared.processes import delivery_store as store
from shared.processes.delivery_store import Delivery
from shared.processes.store import lock

_LIST = f"""
SELECT {store.COLUMNS} FROM deliveries WHERE number < %(before)s AND (%(tenant)s = '' OR tenant = %(tenant)s)
"""  # noqa: S608 (our own column names)
_LIST_STATUS = " AND status = %(status)s"
_LIST_ORDER = " ORDER BY number DESC LIMIT %(limit)s"
_GET = f"SELECT {store.COLUMNS} FROM deliveries WHERE delivery_id = ANY(%s) ORDER BY number"  # noqa: S608 (as above)
_RETRY = """
UPDATE deliveries SET status = 'pending', due_at = %s, ended_at = NULL, tries = 0 WHERE number = %s
"""
_DISCARD = """
UPDATE deliveries SET status = 'discarded', ended_at = %s, last_error = %s WHERE number = %s
"""
_DELETE = "DELETE FROM deliveries WHERE number = %s"
_NEWEST = 2**62


class DeliveryAdmin:
    """Answers operators, beside the sender or anywhere else."""

    def __init__(
        self,
        reads: Reads,
        announcements: Announcements,
        shard: int,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        """`wake` is called when there is something to send; a sender in another instance finds it within a second."""
        self._reads = reads
        self._announcements = announcements
        self._shard = shard
        self._clock = clock
        self._wake = wake

    async def find(self, limit: int, before: int | None, *, tenant: str = "", status: str = "") -> Sequence[Delivery]:
        """Deliveries with lower numbers than that, newest first."""
        query = _LIST + (_LIST_STATUS if status else "") + _LIST_ORDER
        parameters = {"before": _NEWEST if before is None else before, "tenant": tenant, "status": status, "limit": limit}
        async with self._reads.connection() as connection:
            cursor = await connection.execute(query, parameters)
            return [Delivery(*row) for row in await cursor.fetchall()]

    async def get(self, delivery_id: UUID) -> Delivery:
        """One delivery. Raises NotFound (DELIVERY_NOT_FOUND)."""
        async with self._reads.connection() as connection:
            return await self._one(connection, delivery_id)

    async def retry(self, delivery_id: UUID) -> Sequence[Delivery]:
        """Makes a delivery due at once, with all its tries again. Returns it, or the deliveries that its fold returns now.

        Raises NotFound (DELIVERY_NOT_FOUND), Rejected (DELIVERY_SENT, BEING_SENT, FOLD_FAILED).
        """
        async with self._turn(delivery_id) as (connection, delivery):
            ids = [delivery_id]
            if delivery.channel == announce.FOLD:
                fresh = announce.asked_again(self._announcements, delivery.tenant, delivery.name, delivery.content)
                if any(it.channel == announce.FOLD for it in fresh):
                    raise Rejected("FOLD_FAILED", "the announcement's fold raised again")
                await connection.execute(_DELETE, (delivery.number,))
                if fresh:
                    await store.insert(connection, fresh, self._clock())
                ids = [it.delivery_id for it in fresh]
            else:
                await connection.execute(_RETRY, (self._clock(), delivery.number))
            cursor = await connection.execute(_GET, (ids,))
            found = [Delivery(*row) for row in await cursor.fetchall()]
        self._wake()
        return found

    async def discard(self, delivery_id: UUID, reason: str, user_id: str) -> Delivery:
        """Gives a delivery up, and keeps the reason and the user.

        Raises NotFound (DELIVERY_NOT_FOUND), Rejected (DELIVERY_SENT, BEING_SENT).
        """
        async with self._turn(delivery_id) as (connection, delivery):
            if delivery.status != "discarded":
                await connection.execute(_DISCARD, (self._clock(), f"discarded by {user_id}: {reason}", delivery.number))
            return await self._one(connection, delivery_id)

    async def _one(self, connection: Connection, delivery_id: UUID) -> Delivery:
        cursor = await connection.execute(_GET, ([delivery_id],))
        row = await cursor.fetchone()
        if row is None:
            raise NotFound("DELIVERY_NOT_FOUND", f"there is no delivery {delivery_id}")
        return Delivery(*row)

    @asynccontextmanager
    async def _turn(self, delivery_id: UUID) -> AsyncIterator[tuple[Connection, Delivery]]:
        """A transaction during which nothing is claimed, with a delivery that has not been sent."""
        async with self._reads.connection() as connection, connection.transaction():
            await lock(connection, store.SENDER, self._shard)
            delivery = await self._one(connection, delivery_id)
            if delivery.status == "sent":
                raise Rejected("DELIVERY_SENT", "the receiver took it")
            if delivery.sending:
                raise Rejected("BEING_SENT", "it is being sent at this moment; see what becomes of it")
            yield connection, delivery

"""The table of deliveries, and every statement that reads or writes it.

There are two fences. The runner of processes inserts rows behind its own checkpoint. The sender has a checkpoint row named
"deliveries", whose position is the number of the current sender: each sender takes the next number when it starts, and checks
it at the begin of each transaction. A sender that was paused and replaced finds another number and writes nothing.
An operator's action locks that row, so no delivery is claimed while it is changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from shared.line.checkpoint import Fenced
from shared.platform.packing import texts, timestamptz, uuids
from shared.platform.postgres import Connection
from shared.processes.announce import NewDelivery

SENDER = "deliveries"

COLUMNS = (
    "number, delivery_id, tenant, name, channel, recipient, order_key, content, source, correlation_id, traceparent, status, "
    "last_error, created_at, due_at, ended_at, tries, sending"
)

_INSERT = """
INSERT INTO deliveries (delivery_id, tenant, name, channel, recipient, order_key, content, source, correlation_id, traceparent,
  status, last_error, created_at, due_at, ended_at)
SELECT k.delivery_id, k.tenant, k.name, k.channel, k.recipient, k.order_key, k.content, k.source, k.correlation_id, k.traceparent,
  k.status, k.last_error, %s, %s, CASE k.status WHEN 'dead' THEN %s::timestamptz END
FROM unnest(%s::uuid[], %s::text[], %s::text[], %s::text[], %s::text[], %s::text[], %s::text[], %s::text[], %s::text[],
  %s::text[], %s::text[], %s::text[]) WITH ORDINALITY AS k (delivery_id, tenant, name, channel, recipient, order_key, content,
  source, correlation_id, traceparent, status, last_error, place)
ORDER BY k.place
ON CONFLICT (delivery_id) DO NOTHING
"""

_TAKE_TERM = """
UPDATE checkpoints SET position = position + 1, state = 'running', reason = '', moved_at = clock_timestamp()
WHERE name = %s AND shard = %s RETURNING position
"""

_IN_TERM = "SELECT FROM checkpoints WHERE name = %s AND shard = %s AND position = %s FOR UPDATE"

# A message that an earlier sender was sending may have arrived. It is sent again under the same id, so a receiver can tell.
_TAKE_OVER = "UPDATE deliveries SET sending = false, due_at = %s WHERE sending AND number <> ALL(%s)"

# A message waits behind an earlier one of its line that is not due yet. Such rows become due with the earlier one, so that
# the window below is not full of rows that cannot be sent.
_WINDOW = """
SELECT d.number, (
  SELECT max(e.due_at) FROM deliveries e
  WHERE e.status = 'pending' AND e.tenant = d.tenant AND e.recipient = d.recipient AND e.order_key = d.order_key
    AND e.number < d.number AND e.due_at > %(now)s)
FROM deliveries d
WHERE d.status = 'pending' AND NOT d.sending AND d.due_at <= %(now)s
  AND (d.tenant, d.recipient) NOT IN (SELECT * FROM unnest(%(tenants)s::text[], %(recipients)s::text[]))
ORDER BY d.due_at, d.number LIMIT %(window)s
"""

_WAIT_BEHIND = """
UPDATE deliveries d SET due_at = k.due_at FROM unnest(%s::bigint[], %s::timestamptz[]) AS k (number, due_at)
WHERE d.number = k.number
"""

# The lowest numbers of each line, and a limited number for each recipient. A row is left out unless all its predecessors are in.
_CLAIM = f"""
WITH chosen AS (
  SELECT d.number FROM deliveries d JOIN (
    SELECT w.number, row_number() OVER (PARTITION BY w.tenant, w.recipient ORDER BY w.number) AS place
    FROM deliveries w WHERE w.number = ANY(%(window)s) AND NOT EXISTS (
      SELECT FROM deliveries e
      WHERE e.status = 'pending' AND e.tenant = w.tenant AND e.recipient = w.recipient AND e.order_key = w.order_key
        AND e.number < w.number AND e.number <> ALL(%(window)s))) AS k ON k.number = d.number
  WHERE k.place <= %(each)s ORDER BY d.number LIMIT %(limit)s)
UPDATE deliveries SET sending = true, tries = tries + 1 FROM chosen WHERE deliveries.number = chosen.number
RETURNING {", ".join(f"deliveries.{column}" for column in COLUMNS.split(", "))}
"""  # noqa: S608 (our own column names)

# A result counts only for its own try: if an operator or a later sender has taken the delivery back, no row matches.
_ENDED = """
UPDATE deliveries SET status = %s, last_error = %s, ended_at = %s, sending = false
WHERE number = %s AND tries = %s AND sending
"""
_LATER = """
UPDATE deliveries SET due_at = %s, last_error = %s, sending = false WHERE number = %s AND tries = %s AND sending
"""
_RELEASE = """
UPDATE deliveries SET due_at = %s, tries = tries - 1, sending = false WHERE number = ANY(%s) AND sending
"""

_NEXT_DUE = "SELECT min(due_at) FROM deliveries WHERE status = 'pending' AND NOT sending AND due_at > %s"

_FORGET = """
DELETE FROM deliveries WHERE number IN (
  SELECT number FROM deliveries WHERE ended_at < %s AND status <> 'dead' ORDER BY ended_at LIMIT %s)
"""


class Delivery(NamedTuple):
    """A delivery; the fields are the row's columns."""

    number: int
    delivery_id: UUID
    tenant: str
    name: str
    channel: str
    recipient: str
    order_key: str
    content: str
    source: str
    correlation_id: str
    traceparent: str
    status: str
    last_error: str
    created_at: datetime
    due_at: datetime
    ended_at: datetime | None
    tries: int
    sending: bool

    @property
    def line(self) -> tuple[str, str, str]:
        """Deliveries of the same line arrive in order."""
        return self.tenant, self.recipient, self.order_key

    @property
    def contact(self) -> tuple[str, str]:
        """The tenant, and the contact's name there."""
        return self.tenant, self.recipient


async def insert(connection: Connection, deliveries: Sequence[NewDelivery], now: datetime) -> None:
    """Saves deliveries, due at once. A delivery that exists already stays as it is."""
    columns = list(zip(*deliveries, strict=True))
    packed = [uuids(columns[0]), *(texts(column) for column in columns[1:])]
    moment = timestamptz(now)
    await connection.execute(_INSERT, (moment, moment, moment, *packed))


async def take_term(connection: Connection, shard: int) -> int:
    """Makes the caller the sender; returns its number."""
    await connection.execute("INSERT INTO checkpoints (name, shard) VALUES (%s, %s) ON CONFLICT DO NOTHING", (SENDER, shard))
    cursor = await connection.execute(_TAKE_TERM, (SENDER, shard))
    row = await cursor.fetchone()
    assert row is not None  # the row was just made, and nobody may delete it
    return int(row[0])


async def take_over(connection: Connection, under_way: Sequence[int], now: datetime) -> None:
    """Makes deliveries due that an earlier sender may have sent, except those `under_way`, which are the caller's own."""
    await connection.execute(_TAKE_OVER, (now, list(under_way)))


async def hold_term(connection: Connection, shard: int, term: int) -> None:
    """The fence of a sender's transaction. Raises Fenced if there is another sender."""
    cursor = await connection.execute(_IN_TERM, (SENDER, shard, term))
    if await cursor.fetchone() is None:
        raise Fenced(f"{SENDER}: sender {term} was replaced")


async def claim(
    connection: Connection, now: datetime, busy: Sequence[tuple[str, str]], *, each: int, limit: int, window: int
) -> list[Delivery]:
    """Claims due deliveries, at most `each` for a contact and none for a contact in `busy`, in the order of their lines.

    Their rows say that they are being sent before they are, so a sent delivery never looks like an unsent one.
    """
    parameters: dict[str, Any] = {
        "now": now,
        "window": window,
        "tenants": texts([tenant for tenant, _ in busy]),
        "recipients": texts([recipient for _, recipient in busy]),
    }
    cursor = await connection.execute(_WINDOW, parameters)
    found = await cursor.fetchall()
    if behind := [(number, due_at) for number, due_at in found if due_at is not None]:
        numbers, moments = zip(*behind, strict=True)
        await connection.execute(_WAIT_BEHIND, (list(numbers), list(moments)))
    if not (free := [number for number, due_at in found if due_at is None]):
        return []
    cursor = await connection.execute(_CLAIM, {"window": free, "each": each, "limit": limit})
    return sorted((Delivery(*row) for row in await cursor.fetchall()), key=lambda it: it.number)


async def end(connection: Connection, delivery: Delivery, status: str, error: str, now: datetime) -> None:
    """Notes that a delivery was sent, or is given up."""
    await connection.execute(_ENDED, (status, error, now, delivery.number, delivery.tries))


async def later(connection: Connection, delivery: Delivery, error: str, due_at: datetime) -> None:
    """Notes that a try failed, and when the next one is due."""
    await connection.execute(_LATER, (due_at, error, delivery.number, delivery.tries))


async def release(connection: Connection, deliveries: Sequence[Delivery], due_at: datetime) -> None:
    """Releases deliveries that were claimed and not tried."""
    if not deliveries:
        return
    await connection.execute(_RELEASE, (due_at, [delivery.number for delivery in deliveries]))


async def next_due(connection: Connection, now: datetime) -> datetime | None:
    """When the next delivery becomes due; None if there is none."""
    cursor = await connection.execute(_NEXT_DUE, (now,))
    row = await cursor.fetchone()
    return None if row is None else row[0]


async def forget(connection: Connection, before: datetime, limit: int) -> int:
    """Deletes deliveries that were sent or discarded before that time; returns how many. Dead ones stay for an operator."""
    cursor = await connection.execute(_FORGET, (before, limit))
    return cursor.rowcount

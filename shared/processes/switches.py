"""Which announcements tenants have switched off, as the line says.

A switch is a command of the write service; its event, `foldline.v1.OverrideSwitched`, is on the line. The runner takes it in
the round of its batch: what is announced of events behind it, and of steps of that round and later ones, follows it. The table is
written in the transaction that moves the checkpoint, so it is always that of the checkpoint.

Each switch is kept with its place, KEPT_MAX of each announcement, so that after a restore of the line the table is that of the
restored place: what was off there and was switched on behind it is off again.

Killed anywhere: the switch is in the table and the checkpoint is behind it, or neither. A repeat writes the same row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import LiteralString, NamedTuple

from foldline.v1.event_store_pb2 import EventEnvelope
from foldline.v1.override_pb2 import OverrideSwitched
from shared.folds.delivery import SwitchedOff
from shared.platform.postgres import Connection

KEPT_MAX = 100
"""How many switches of an announcement of a tenant are kept. A line that is restored to before the oldest of them has it as it
was just before that one."""

OVERRIDE_SWITCHED = OverrideSwitched.DESCRIPTOR.full_name


class Switched(NamedTuple):
    """A switch of an override of a tenant. It may be one of the write service's, which nothing here goes by."""

    tenant: str
    name: str
    on: bool
    position: int


def switched(envelope: EventEnvelope) -> Switched:
    """The switch that an event of type OVERRIDE_SWITCHED tells of."""
    event = OverrideSwitched.FromString(envelope.payload)
    return Switched(envelope.tenant, event.name, event.on, envelope.position)


def after(off: frozenset[SwitchedOff], switch: Switched) -> frozenset[SwitchedOff]:
    """What is off behind a switch."""
    own = frozenset({(switch.tenant, switch.name)})
    return off - own if switch.on else off | own


async def load(connection: Connection, shard: int) -> frozenset[SwitchedOff]:
    """What is off at the checkpoint."""
    cursor = await connection.execute("SELECT tenant, name FROM switched_off WHERE shard = %s", (shard,))
    return frozenset([(tenant, name) for tenant, name in await cursor.fetchall()])


_OFF: LiteralString = """
INSERT INTO switched_off AS s (shard, tenant, name, position) VALUES (%s, %s, %s, %s)
ON CONFLICT (shard, tenant, name) DO UPDATE SET position = excluded.position
"""
_ON: LiteralString = "DELETE FROM switched_off WHERE shard = %s AND tenant = %s AND name = %s"
_KEEP: LiteralString = """
INSERT INTO announcement_switches (shard, tenant, name, position, is_on) VALUES (%s, %s, %s, %s, %s)
ON CONFLICT (shard, tenant, name, position) DO UPDATE SET is_on = excluded.is_on
"""
_DROP_OLDEST: LiteralString = """
DELETE FROM announcement_switches WHERE shard = %(shard)s AND tenant = %(tenant)s AND name = %(name)s AND position <= (
  SELECT position FROM announcement_switches WHERE shard = %(shard)s AND tenant = %(tenant)s AND name = %(name)s
  ORDER BY position DESC OFFSET %(kept)s LIMIT 1)
"""


async def save(connection: Connection, shard: int, switches: Sequence[Switched]) -> None:
    """Writes switches, in the order of the line."""
    for switch in switches:
        key = shard, switch.tenant, switch.name
        if switch.on:
            await connection.execute(_ON, key)
        else:
            await connection.execute(_OFF, (*key, switch.position))
        await connection.execute(_KEEP, (*key, switch.position, switch.on))
        await connection.execute(_DROP_OLDEST, {**dict(zip(("shard", "tenant", "name"), key, strict=True)), "kept": KEPT_MAX})


# A switch changes something, so what an announcement was before the oldest that is kept is the contrary of what that one made it.
_OFF_AGAIN: LiteralString = """
INSERT INTO switched_off (shard, tenant, name, position)
SELECT k.shard, k.tenant, k.name, coalesce(before.position, 0)
FROM (SELECT DISTINCT shard, tenant, name FROM announcement_switches WHERE shard = %(shard)s AND position > %(position)s) AS k
CROSS JOIN LATERAL (
  SELECT is_on FROM announcement_switches s
  WHERE (s.shard, s.tenant, s.name) = (k.shard, k.tenant, k.name) AND s.position > %(position)s
  ORDER BY s.position LIMIT 1) AS behind
LEFT JOIN LATERAL (
  SELECT position, is_on FROM announcement_switches s
  WHERE (s.shard, s.tenant, s.name) = (k.shard, k.tenant, k.name) AND s.position <= %(position)s
  ORDER BY s.position DESC LIMIT 1) AS before ON true
WHERE NOT coalesce(before.is_on, NOT behind.is_on)
ON CONFLICT (shard, tenant, name) DO UPDATE SET position = excluded.position
"""


async def delete_behind(connection: Connection, shard: int, position: int) -> None:
    """Makes it as it was at a position, because the line has another history from there on. Call it in a transaction."""
    place = {"shard": shard, "position": position}
    await connection.execute("DELETE FROM switched_off WHERE shard = %(shard)s AND position > %(position)s", place)
    await connection.execute(_OFF_AGAIN, place)
    await connection.execute("DELETE FROM announcement_switches WHERE shard = %(shard)s AND position > %(position)s", place)

"""Which announcements tenants have switched off, as the line says.

A switch is a command of the write service; its event, `foldline.v1.OverrideSwitched`, is on the line. The runner takes it in
the round of its batch: what is announced of events behind it, and of steps of that round and later ones, follows it. The table is
written in the transaction that moves the checkpoint, so it is always that of the checkpoint.

Killed anywhere: the switch is in the table and the checkpoint is behind it, or neither. A repeat writes the same row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import LiteralString, NamedTuple

from foldline.v1.event_store_pb2 import EventEnvelope
from foldline.v1.override_pb2 import OverrideSwitched
from shared.folds.delivery import SwitchedOff
from shared.platform.postgres import Connection

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


async def save(connection: Connection, shard: int, switches: Sequence[Switched]) -> None:
    """Writes switches, in the order of the line."""
    for switch in switches:
        key = shard, switch.tenant, switch.name
        if switch.on:
            await connection.execute(_ON, key)
        else:
            await connection.execute(_OFF, (*key, switch.position))


async def delete_behind(connection: Connection, shard: int, position: int) -> None:
    """Forgets what was switched off behind a position, because the line has another history from there on."""
    await connection.execute("DELETE FROM switched_off WHERE shard = %s AND position > %s", (shard, position))

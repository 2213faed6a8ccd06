"""`python -m write_service.relay`: publishes the committed events of one shard, in order.

Any number may run; one of them leads, the others stand by. On SIGTERM the relay waits for the acknowledgements of what it has
published, then ends with exit code 0. Processes may start in any order: the relay waits for the database, its tables and NATS,
and logs what it waits for.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from nats.aio.client import Client
from pydantic import Field

from shared.line.broker_access import Broker, BrokerTooOld, connect, refuse_old
from shared.line.lag import relay_lag
from shared.line.relay import Relay, Retention, WrongShard
from shared.platform.instruments import Labels
from shared.platform.leader import LockClass, lead, until
from shared.platform.metrics import Metrics
from shared.platform.peers import BrokerPeer
from shared.platform.probe import DatabaseProbe
from shared.platform.settings import load
from shared.platform.urls import DatabaseUrl
from shared.rpc import bootstrap


class RelaySettings(BrokerPeer):
    """The relay: publishes the committed events of one shard to NATS, in order."""

    database_url: DatabaseUrl
    """The write database's URL, as the application role and not through a pooler: a session's lock elects the leader."""
    shard: int = Field(1, ge=1)
    """The shard whose events are published."""
    stream_age_max_s: float = Field(24 * 3600.0, ge=1)
    """How long the stream keeps an event, in seconds; consumers read older ones from the event store."""
    stream_bytes_max: int = Field(1024 * 1024 * 1024, ge=1024 * 1024)
    """How large the stream may grow, in bytes."""
    stream_replicas: int = Field(1, ge=1, le=5)
    """How many NATS servers keep a copy of the stream."""


class Publishing:
    """What the relay does, and what it needs for that."""

    def __init__(self, settings: RelaySettings) -> None:
        self._settings = settings
        self._client: Client | None = None
        self._relay: Relay | None = None

    @asynccontextmanager
    async def connected(self, stopping: asyncio.Event) -> AsyncIterator[None]:
        """Connects to NATS, and returns without a connection if `stopping` is set before. One connection for all leases.

        Raises BrokerTooOld.
        """
        settings = self._settings
        client = await until(stopping, connect(Broker.of(settings), f"relay-{settings.shard}"))
        self._client = client
        try:
            if client is not None:
                refuse_old(client)
            yield
        finally:
            if client is not None:
                await client.close()

    async def run(self, stopping: asyncio.Event) -> None:
        """Publishes as the leader until `stopping` is set. Raises WrongShard, UnsafeDatabase and BrokerTooOld."""
        assert self._client is not None  # nobody leads before `connected`
        settings = self._settings
        retention = Retention(
            age_max_s=settings.stream_age_max_s,
            bytes_max=settings.stream_bytes_max,
            replicas=settings.stream_replicas,
        )
        self._relay = Relay(settings.database_url.get_secret_value(), self._client, settings.shard, retention)
        try:
            await self._relay.run(stopping)
        finally:
            self._relay = None

    def measure(self, metrics: Metrics, probe: DatabaseProbe) -> None:
        """Makes metrics of how far it is; one that stands by has none."""

        def places() -> dict[str, int]:
            relay = self._relay
            return {} if relay is None or not relay.follows else {str(relay.shard): relay.position}

        def position() -> list[tuple[float, Labels]]:
            return [(at, {"foldline.shard": shard}) for shard, at in places().items()]

        metrics.gauge("foldline.relay.position", "The position up to which the stream holds the line, by who leads.", position)
        relay_lag(metrics, places, probe)

    async def reaches_broker(self) -> str:
        """A check of readiness."""
        return "" if self._client is not None and self._client.is_connected else "NATS is away"


def main() -> int:
    """Reads the settings and runs."""
    settings = load(RelaySettings, "write_service.relay")
    publishing = Publishing(settings)
    database_url = settings.database_url.get_secret_value()

    async def work(stopping: asyncio.Event) -> None:
        await lead(database_url, LockClass.RELAY, settings.shard, lambda: publishing.run(stopping), stopping)

    return bootstrap.lead(
        "relay",
        settings,
        database_url,
        settings.shard,
        work,
        around=publishing.connected,
        checks={"broker": publishing.reaches_broker},
        measure=publishing.measure,
        refuses=(WrongShard, BrokerTooOld),
    )


if __name__ == "__main__":
    sys.exit(main())

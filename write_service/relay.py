"""`python -m write_service.relay`: publishes the committed events of one shard, in order.

Any number may run; one of them leads, the others stand by. SIGTERM lets what is under way be acknowledged, then ends
with exit code 0. The order in which processes start does not matter: it waits for the database, its tables and NATS,
and says so.
"""

from __future__ import annotations

import sys

import structlog
from pydantic import Field, SecretStr

from shared.line import broker
from shared.line.relay import Relay, Retention, WrongShard
from shared.platform import process, startup
from shared.platform.leader import LockClass, lead, until
from shared.platform.settings import ProcessSettings, load

log = structlog.get_logger(__name__)


class RelaySettings(ProcessSettings):
    """The relay: publishes the committed events of one shard to NATS, in order."""

    database_url: SecretStr
    """The write database's URL, as the application role and not through a pooler: a session's lock elects the leader."""
    nats_url: SecretStr
    """The NATS servers, nats://user:password@host:port, several separated by commas."""
    shard: int = Field(1, ge=1)
    """The shard whose events are published."""
    stream_age_max_s: float = Field(24 * 3600.0, ge=1)
    """How long the stream keeps an event, in seconds; consumers read older ones from the event store."""
    stream_bytes_max: int = Field(1024 * 1024 * 1024, ge=1024 * 1024)
    """How large the stream may grow, in bytes."""
    stream_replicas: int = Field(1, ge=1, le=5)
    """How many NATS servers keep a copy of the stream."""


async def run(settings: RelaySettings) -> None:
    """Leads or stands by until SIGTERM or SIGINT. Raises WrongShard and UnsafeDatabase."""
    stopping = process.stop_requested()
    log.info("relay_started", shard=settings.shard)
    client = await until(stopping, broker.connect(settings.nats_url.get_secret_value(), f"relay-{settings.shard}"))
    if client is not None:
        database_url = settings.database_url.get_secret_value()
        retention = Retention(
            age_max_s=settings.stream_age_max_s,
            bytes_max=settings.stream_bytes_max,
            replicas=settings.stream_replicas,
        )
        relay = Relay(database_url, client, settings.shard, retention)
        try:
            await lead(database_url, LockClass.RELAY, settings.shard, lambda: relay.run(stopping), stopping)
        finally:
            await client.close()
    log.info("relay_stopped", shard=settings.shard)


def main() -> int:
    """Reads the settings and runs."""
    settings = load(RelaySettings, "write_service.relay")
    return startup.run("relay", settings, lambda: run(settings), refuses=(WrongShard,))


if __name__ == "__main__":
    sys.exit(main())

"""`python -m write_service.relay`: publishes the committed events of one shard, in order.

Any number may run; one of them leads, the others stand by. On SIGTERM it waits for the acknowledgements of what it has
published, then ends with exit code 0. The order in which processes start does not matter: it waits for the database, its
tables and NATS, and logs what it waits for.
"""

from __future__ import annotations

import asyncio
import sys

from pydantic import Field, SecretStr

from shared.line import broker
from shared.line.relay import Relay, Retention, WrongShard
from shared.platform.leader import LockClass, until
from shared.platform.settings import ProcessSettings
from shared.rpc import bootstrap


class RelaySettings(ProcessSettings):
    """The relay's settings: environment variables FOLDLINE_DATABASE_URL (not a pooler's), FOLDLINE_NATS_URL and so on."""

    database_url: SecretStr
    nats_url: SecretStr
    shard: int = Field(1, ge=1)
    stream_age_max_s: float = Field(24 * 3600.0, ge=1)
    stream_bytes_max: int = Field(1024 * 1024 * 1024, ge=1024 * 1024)
    stream_replicas: int = Field(1, ge=1, le=5)


async def publish(settings: RelaySettings, stopping: asyncio.Event) -> None:
    """Publishes as the leader until `stopping` is set. Raises WrongShard and UnsafeDatabase."""
    client = await until(stopping, broker.connect(settings.nats_url.get_secret_value(), f"relay-{settings.shard}"))
    if client is None:
        return
    retention = Retention(
        age_max_s=settings.stream_age_max_s,
        bytes_max=settings.stream_bytes_max,
        replicas=settings.stream_replicas,
    )
    try:
        await Relay(settings.database_url.get_secret_value(), client, settings.shard, retention).run(stopping)
    finally:
        await client.close()


def main() -> int:
    """Reads the settings and runs."""
    settings = RelaySettings()  # type: ignore[call-arg]  # from the environment
    return bootstrap.lead(
        "relay",
        settings,
        settings.database_url.get_secret_value(),
        LockClass.RELAY,
        settings.shard,
        lambda stopping: publish(settings, stopping),
        refuses=(WrongShard,),
    )


if __name__ == "__main__":
    sys.exit(main())

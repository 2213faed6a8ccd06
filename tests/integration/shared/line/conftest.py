"""A NATS as an operator sees it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from nats.aio.client import Client
from nats.js import JetStreamContext

from deploy.engines.nats import Nats
from shared.line.broker_access import Broker, connect


@pytest.fixture
async def client(nats_server: Nats) -> AsyncIterator[Client]:
    """A connection of the test's own to a NATS of its own."""
    client = await connect(Broker(nats_server.url), "test")
    yield client
    await client.close()


@pytest.fixture
def streams(client: Client) -> JetStreamContext:
    """JetStream, as an operator sees it."""
    return client.jetstream()

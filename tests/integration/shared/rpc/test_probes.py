"""What is asked of every process from outside: gRPC health with liveness and readiness, and numbers of its calls."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from grpc import StatusCode, aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.engines.postgres import Postgres
from shared.platform.settings import ProcessSettings, ServerSettings
from shared.platform.tokens import DevelopmentIssuer
from shared.rpc.client import channel
from shared.rpc.probes import LIVENESS, READINESS, Probes
from shared.rpc.server import Server
from tests.support.system.engines import Engines
from tests.support.system.waiting import eventually

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


async def status(through: aio.Channel, service: str) -> int:
    """What health says of a service."""
    answer = await health_pb2_grpc.HealthStub(through).Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
    return int(answer.status)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    """A server that is still starting."""
    server = Server(ServerSettings(jwks_file=DevelopmentIssuer(tmp_path).jwks_file), roles={})
    await server.start(serving=False)
    yield server
    await server.drain()


async def test_a_process_that_starts_is_alive_and_becomes_ready(server: Server) -> None:
    """Liveness is SERVING from the first moment, readiness and the services when the process has what it needs."""
    async with channel(f"127.0.0.1:{server.port}") as through:
        assert [await status(through, name) for name in (LIVENESS, READINESS, "")] == [SERVING, NOT_SERVING, NOT_SERVING]
        await server.set_serving(True)

        async def ready() -> bool:
            return bool(await status(through, READINESS) == SERVING)

        await eventually(ready, 5)
        assert [await status(through, name) for name in (LIVENESS, "")] == [SERVING, SERVING]
        with pytest.raises(aio.AioRpcError) as refused:
            await status(through, "unknown")
        assert refused.value.code() is StatusCode.NOT_FOUND


async def test_a_process_that_drains_is_alive_but_not_ready(server: Server) -> None:
    """Who ends what is not alive must not end a process that finishes its calls; and it never becomes ready again."""
    await server.set_serving(True)
    await server.probes.readiness.ask()
    await server.probes.drain(("",))
    await server.set_serving(True)
    await server.probes._tell_ready(True)
    async with channel(f"127.0.0.1:{server.port}") as through:
        assert [await status(through, name) for name in (LIVENESS, READINESS, "")] == [SERVING, NOT_SERVING, NOT_SERVING]


async def test_a_database_that_goes_and_comes_back(private_engines: Engines) -> None:
    """Readiness follows it, frozen or down; liveness never asks it."""
    postgres: Postgres = private_engines.postgres
    probes = Probes(ProcessSettings(), "test")
    database = probes.needs_database(private_engines.clone("write").app)
    async with probes.alone(), channel(f"127.0.0.1:{probes.port}", retries=False) as through:

        async def readiness(expected: int) -> bool:
            return bool(await status(through, READINESS) == expected)

        await eventually(lambda: readiness(SERVING), 10)
        assert await database.rows("SELECT 40 + 2") == [(42,)]
        postgres.stop()
        await eventually(lambda: readiness(NOT_SERVING), 15)
        assert probes.readiness.failures == {"database": "the database is away, or cannot answer now"}
        assert await status(through, LIVENESS) == SERVING
        postgres.start()
        await eventually(lambda: readiness(SERVING), 15)


async def test_calls_are_counted_by_method_and_status(server: Server) -> None:
    """Health and reflection are nobody's calls; a process that serves nothing has no such numbers."""
    await server.probes.readiness.ask()
    _, text = await server.probes.metrics.render()
    names = {line.split("{")[0].split(" ")[0] for line in text.decode().splitlines() if not line.startswith("#")}
    assert {"process_memory_usage_bytes", "process_cpu_time_seconds_total", "process_open_file_descriptors"} <= names
    assert not any(name.startswith("rpc_server") for name in names)

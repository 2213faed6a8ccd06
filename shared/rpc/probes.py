"""What operators' probes can ask of every process: gRPC health, readiness, and the admin port.

gRPC health knows two services beside those that a process serves, for the probes of whatever runs it:

    liveness     SERVING as long as the event loop turns; never asks a database
    readiness    SERVING while every check of `readiness` passes: see shared/rpc/readiness.py
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from shared.platform import tracing
from shared.platform.certificate_ends import watch_certificates
from shared.platform.metrics import Metrics
from shared.platform.probe import DatabaseProbe
from shared.platform.settings import ProcessSettings
from shared.platform.telemetry import logger
from shared.platform.vitals import Vitals
from shared.rpc.admin_port import AdminPort
from shared.rpc.readiness import Readiness
from shared.rpc.tls import listen

LIVENESS, READINESS = "liveness", "readiness"

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_CALLS_MAX = 100

log = logger(__name__)


class Probes:
    """Health, readiness and metrics of one process."""

    def __init__(self, settings: ProcessSettings, service: str = "foldline") -> None:
        """`service` is the process's name in everything that it exports."""
        self.metrics = Metrics(service)
        self.vitals = Vitals(self.metrics)
        watch_certificates(self.metrics, settings)
        self.readiness = Readiness()
        self.servicer = health.aio.HealthServicer()
        self.admin = AdminPort(settings.admin_listen, self.readiness, self.metrics.render)
        self._settings = settings
        self._tasks: list[asyncio.Task[None]] = []
        self._databases: list[DatabaseProbe] = []
        self._draining = False
        self.port = 0

    def needs_database(self, url: str, name: str = "database") -> DatabaseProbe:
        """Makes a database a condition of readiness; returns the connection that asks it, for other questions too."""
        database = DatabaseProbe(url, application_name="foldline-probe")
        self._databases.append(database)
        self.readiness.add(name, database.answers)
        return database

    async def open(self) -> None:
        """Opens the admin port, and begins to ask what readiness rests on. Raises CannotStart if the address is taken."""
        await self.servicer.set(LIVENESS, _SERVING)
        await self.servicer.set(READINESS, _NOT_SERVING)
        await self.admin.open()
        self._tasks = [
            asyncio.create_task(self.readiness.keep_asking(self._tell_ready)),
            asyncio.create_task(self.metrics.watch_loop()),
            asyncio.create_task(self.vitals.beat()),
        ]

    async def set_serving(self, services: Iterable[str], *, serving: bool) -> None:
        """What health says of these services. Once drained, nothing serves."""
        for service in services:
            await self.servicer.set(service, _SERVING if serving and not self._draining else _NOT_SERVING)

    async def drain(self, services: Iterable[str]) -> None:
        """Says that the process takes nothing new. It is alive all the same: who ends an unhealthy one must not end this."""
        self._draining = True
        self.readiness.drain()
        await self.set_serving((*services, READINESS), serving=False)

    async def close(self) -> None:
        """Ends what `open` began."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.readiness.close()
        for database in self._databases:
            await database.close()
        await self.admin.close()
        self.metrics.shutdown(tracing.SHUTDOWN_S)

    async def _tell_ready(self, ready: bool) -> None:
        await self.set_serving((READINESS,), serving=ready)

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """For a process that serves nothing else: answers gRPC health on `listen`, and the admin port, in the block.

        Raises CannotStart if an address is taken.
        """
        server = aio.server(maximum_concurrent_rpcs=_CALLS_MAX, options=(("grpc.so_reuseport", 0),))
        health_pb2_grpc.add_HealthServicer_to_server(self.servicer, server)
        self.port = listen(server, self._settings)
        await self.open()
        try:
            await server.start()
            log.info("listening", address=self._settings.listen, port=self.port)
            yield
        finally:
            await self.drain(("",))
            await server.stop(0)
            await self.close()

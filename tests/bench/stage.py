"""Where it is measured: PostgreSQL and NATS of our own, Foldline's processes as they are shipped, and our children."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import psycopg

from deploy.bootstrap import Database
from deploy.local.system import WRITE, System
from shared.platform.identity import Role
from tests.bench import workload
from tests.bench.children import Answer, Child
from tests.bench.load import Order
from tests.support.system.engines import Engines

WRITE_SERVICES = 3


class Stage:
    """The engines, the load generator and the echo; databases and processes as the rows ask for them."""

    def __init__(self, folder: Path, engines: Engines, load: Child, echo: Child, echo_address: str) -> None:
        self.folder = folder
        self.engines = engines
        self.load = load
        self.echo = echo
        self.echo_address = echo_address
        self._children: list[Child] = []
        self._systems: list[System] = []
        self._write_services: dict[tuple[tuple[str, str], ...], list[System]] = {}

    def pids(self, system: System, *programs: str) -> dict[str, int]:
        """The processes whose cost is of interest: these programs and all of PostgreSQL."""
        postmaster = self.engines.postgres._process
        assert postmaster is not None  # it runs as long as the stage is there
        return {**{name: system.pid(name) for name in programs}, "postgres": postmaster.pid}

    @property
    def nats_pid(self) -> int:
        """The broker's process."""
        server = self.engines.nats._process
        assert server is not None  # it runs as long as the stage is there
        return server.pid

    async def order(self, system: System, kind: str, **details: Any) -> Answer:
        """Puts a load on the write service of a system."""
        return await self.order_from(self.load, workload.TENANT, system, kind, **details)

    async def order_from(self, load: Child, tenant: str, system: System, kind: str, **details: Any) -> Answer:
        """The same by a given load generator, of which several can work at once, as a given tenant."""
        target = system.programs[WRITE].address
        return await load.ask(Order(kind=kind, target=target, token=self.token(system, tenant), **details))

    def token(self, system: System, tenant: str = workload.TENANT) -> str:
        """The token that a load on this system's write service is sent with."""
        return system.token(tenant, workload.USER, [Role.USER])

    async def order_echo(self, kind: str, method: str, **details: Any) -> Answer:
        """Puts the same load on the echo."""
        return await self.load.ask(Order(kind=kind, target=self.echo_address, method=method, **details))

    async def system(self, *programs: str, settings: Mapping[str, str] | None = None) -> System:
        """Foldline's processes on databases of their own, those of `programs` started and ready."""
        databases = self.engines.databases()
        folder = self.folder / f"system-{len(self._systems)}"
        system = System(folder, databases, self.engines.nats_url, settings=settings)
        self._systems.append(system)
        for name in programs:
            system.start(name)
            await system.wait_ready(name)
        return system

    async def write_services(self, **settings: str) -> list[System]:
        """Write services to take in turn, round after round: warm, with the workload's accounts open.

        Started once for these settings and kept, since many rows use them. The one that is measured runs alone with
        PostgreSQL, as it is shipped but for `settings`. There are several because processes of the same code differ by up
        to 15 % for as long as they live, by where things happen to lie in memory.
        """
        key = tuple(sorted(settings.items()))
        if key not in self._write_services:
            extra = {f"FOLDLINE_{name.upper()}": value for name, value in settings.items()}
            systems = [await self.system(WRITE, settings=extra) for _ in range(WRITE_SERVICES)]
            for system in systems:
                await self.order(system, "set_up", accounts=1000, batch=250)
                await self.order(system, "batch", method=workload.SEND_BATCH, callers=4, seconds=0.5)
                await self.order(system, "stream", method=workload.SEND_STREAM, callers=8, seconds=0.5)
                await self.order(system, "unary", method=workload.DEPOSIT, callers=64, seconds=0.5)
            self._write_services[key] = systems
        return self._write_services[key]

    async def end_row(self) -> None:
        """Ends the processes that a row started for itself: two relays would copy two lines into the broker's one stream."""
        kept = [system for systems in self._write_services.values() for system in systems]
        for system in self._systems:
            if system not in kept:
                await system.stop_all(3)

    async def child(self, name: str, *arguments: str) -> Child:
        """A process of the bench."""
        child = await Child.start(name, *arguments)
        self._children.append(child)
        return child

    async def close(self) -> None:
        """Ends everything."""
        for child in (self.load, self.echo, *self._children):
            await child.stop()
        for system in self._systems:
            await system.stop_all(3)


@contextmanager
def own_folder() -> Iterator[Path]:
    """A folder for one run of the bench; nothing is left of it.

    Beside the project rather than in /tmp, which may be memory: fsync shall mean something.
    """
    kept = Path(".foldline").absolute()
    kept.mkdir(exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=kept, prefix="bench-") as name:
        yield Path(name)


@asynccontextmanager
async def on_stage(folder: Path, engines: Engines) -> AsyncIterator[Stage]:
    """What the rows need, on engines that run, until the end of the block."""
    echo = await Child.start("echo")
    port = int((await echo.answer())["port"])
    stage = Stage(folder, engines, await Child.start("load"), echo, f"127.0.0.1:{port}")
    try:
        yield stage
    finally:
        await stage.close()


@contextmanager
def own_engines(folder: Path) -> Iterator[Engines]:
    """PostgreSQL and NATS, until the end of the block."""
    engines = Engines(folder)
    try:
        engines.start()
        yield engines
    finally:
        engines.stop()


async def head(database: Database) -> int:
    """How long the line is."""
    async with await psycopg.AsyncConnection.connect(database.admin, autocommit=True) as connection:
        cursor = await connection.execute("SELECT coalesce(max(position), 0) FROM events")
        row = await cursor.fetchone()
        assert row is not None  # an aggregate has a row
        return int(row[0])

"""How every process of Foldline starts and ends: `serve` for one that answers gRPC calls, `lead` for one that has a leader.

Both read no settings and build nothing: a `__main__` reads its settings, says how to build, and returns the exit code.
The order in which processes start does not matter: each waits for the others and logs what it waits for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import TYPE_CHECKING

from shared.platform import program, startup
from shared.platform.leader import until
from shared.platform.metrics import Metrics
from shared.platform.postgres import Reads
from shared.platform.probe import DatabaseProbe
from shared.platform.settings import ProcessSettings, ServerSettings
from shared.platform.telemetry import logger
from shared.rpc.probes import Probes
from shared.rpc.readiness import Check

if TYPE_CHECKING:  # a process that serves no calls need not import what serves them
    from shared.rpc.server import Server

log = logger(__name__)

Work = Callable[[asyncio.Event], Coroutine[None, None, None]]
"""Runs until the event is set, then finishes what it has begun and returns."""
Around = Callable[[asyncio.Event], AbstractAsyncContextManager[None]]
"""Holds what the work needs at every lease. Entering it ends early when the event is set."""


async def _wait(stopping: asyncio.Event) -> None:
    await stopping.wait()


def serve(
    service: str,
    settings: ServerSettings,
    reads: Reads,
    build: Callable[[], Server],
    *,
    read_only: Iterable[str] = (),
    written: Iterable[str] = (),
    work: Work = _wait,
) -> int:
    """Serves gRPC until SIGTERM or SIGINT, then drains; returns the exit code.

    Listens at once and reports SERVING as soon as the database is reachable and safe: the role must not be able to write
    the tables `read_only`, and the tables `written` must exist. `build` is called on the running event loop; `work` runs
    beside the server from then on. `reads` is opened here, and closed at the end of the drain, after what `build` registered.
    """

    async def main() -> None:
        stopping = program.stop_requested()
        await reads.open()
        try:
            server = build()
        except BaseException:
            await reads.close()  # the pool's tasks outlive a cancellation, and with them the process
            raise
        server.on_drained(reads.close, last=True)  # work beside the server reads until it is cancelled
        reads.measure(server.probes.metrics)
        try:
            await server.start(serving=False)
            await until(stopping, startup.until_safe(reads, tables=read_only, written=written))
            await server.set_serving(not stopping.is_set())
            await work(stopping)
        finally:
            await server.drain()

    return startup.run(service, settings, main)


def lead(
    service: str,
    settings: ProcessSettings,
    database_url: str,
    shard: int,
    work: Work,
    *,
    around: Around = lambda _: nullcontext(),
    checks: Mapping[str, Check] | None = None,
    measure: Callable[[Metrics, DatabaseProbe], None] = lambda *_: None,
    refuses: tuple[type[Exception], ...] = (),
) -> int:
    """Runs `work`, which leads or stands by (`leader.lead`, `parts.lead_parts`); returns the exit code after SIGTERM or SIGINT.

    `around` is entered once, before the process tries to lead. An exception of the types `refuses` ends the process with an error
    in the log. Leading or not, the process answers gRPC health and its admin port: it is ready while the database answers and the
    `checks` pass. `measure` adds metrics, and may ask the database.
    """

    async def main() -> None:
        stopping = program.stop_requested()
        log.info("process_started", shard=shard)
        probes = Probes(settings, service)
        measure(probes.metrics, probes.needs_database(database_url))
        for name, check in (checks or {}).items():
            probes.readiness.add(name, check)
        async with probes.alone(), around(stopping):
            await work(stopping)
        log.info("process_stopped", shard=shard)

    return startup.run(service, settings, main, refuses=refuses)

"""`python -m saga_service`: runs processes and serves operators. Any number may run; one leads, all of them serve."""

from __future__ import annotations

import sys

from saga_service.app import Leading, SagaSettings, build
from shared.platform import process, startup
from shared.platform.leader import until
from shared.platform.postgres import Reads
from shared.platform.settings import load
from shared.processes.store import TABLES


async def serve(settings: SagaSettings) -> None:
    """Listens at once, is healthy as soon as the database is there, and serves until SIGTERM or SIGINT."""
    reads = Reads(
        settings.database_url.get_secret_value(),
        application_name="foldline-saga-desk",
        size_max=settings.connections_max,
    )
    await reads.open()
    leading = Leading(settings)
    server = build(settings, reads, wake=leading.wake)
    server.on_drained(reads.close)
    stopping = process.stop_requested()
    await server.start(serving=False)
    try:
        await until(stopping, startup.until_safe(reads, written=TABLES))
        await server.set_serving(not stopping.is_set())
        await leading.run(stopping)
    finally:
        await server.drain()


def main() -> int:
    """Reads the settings and serves."""
    settings = load(SagaSettings, "saga_service")
    return startup.run("saga_service", settings, lambda: serve(settings))


if __name__ == "__main__":
    sys.exit(main())

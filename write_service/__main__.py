"""`python -m write_service`: the command API. SIGTERM drains it; the order in which processes start does not matter."""

from __future__ import annotations

import sys

from shared.line.event_store import TABLES
from shared.platform import process, startup
from shared.platform.leader import until
from shared.platform.postgres import Reads
from shared.platform.settings import load
from write_service.app import WriteSettings, build


async def serve(settings: WriteSettings) -> None:
    """Listens at once, is healthy as soon as the database is there, and serves until SIGTERM or SIGINT."""
    reads = Reads(
        settings.database_url.get_secret_value(),
        application_name="foldline-write-reads",
        size_max=settings.connections_max,
    )
    await reads.open()
    server = build(settings, reads)
    server.on_drained(reads.close)
    stopping = process.stop_requested()
    await server.start(serving=False)
    try:
        await until(stopping, startup.until_safe(reads, tables=TABLES))
        await server.set_serving(not stopping.is_set())
        await stopping.wait()
    finally:
        await server.drain()


def main() -> int:
    """Reads the settings and serves."""
    settings = load(WriteSettings, "write_service")
    return startup.run("write_service", settings, lambda: serve(settings))


if __name__ == "__main__":
    sys.exit(main())

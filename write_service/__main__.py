"""`python -m write_service`: the command API. SIGTERM drains it; the order in which processes start does not matter."""

from __future__ import annotations

import sys

from shared.line.event_store import TABLES
from shared.platform.postgres import Reads
from shared.platform.settings import load
from shared.rpc import bootstrap
from write_service.app import WriteSettings, build


def main() -> int:
    """Reads the settings and serves."""
    settings = load(WriteSettings, "write_service")
    reads = Reads(
        settings.database_url.get_secret_value(),
        application_name="foldline-write-reads",
        size_max=settings.connections_max,
    )
    return bootstrap.serve("write_service", settings, reads, lambda: build(settings, reads), read_only=TABLES)


if __name__ == "__main__":
    sys.exit(main())

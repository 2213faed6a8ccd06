"""`python -m read_service`: the query API. SIGTERM drains it; the order in which processes start does not matter."""

from __future__ import annotations

import sys

from read_service.app import TABLES, ReadSettings, build
from shared.platform.postgres import Reads
from shared.platform.settings import load
from shared.rpc import bootstrap


def main() -> int:
    """Reads the settings and serves."""
    settings = load(ReadSettings, "read_service")
    reads = Reads(
        settings.query_database_url.get_secret_value(),
        application_name="foldline-read",
        size_max=settings.connections_max,
    )
    return bootstrap.serve("read_service", settings, reads, lambda: build(settings, reads), read_only=TABLES)


if __name__ == "__main__":
    sys.exit(main())

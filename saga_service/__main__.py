"""`python -m saga_service`: runs processes and serves operators. Any number may run; one leads, all of them serve."""

from __future__ import annotations

import sys

from saga_service.app import Leading, SagaSettings, build
from shared.platform.postgres import Reads
from shared.platform.settings import load
from shared.processes.store import TABLES
from shared.rpc import bootstrap


def main() -> int:
    """Reads the settings, serves, and leads or stands by."""
    settings = load(SagaSettings, "saga_service")
    reads = Reads(
        settings.database_url.get_secret_value(),
        application_name="foldline-saga-admin",
        size_max=settings.connections_max,
    )
    leading = Leading(settings)
    return bootstrap.serve(
        "saga_service",
        settings,
        reads,
        lambda: build(settings, reads, wake=leading.wake, places=leading.places),
        written=TABLES,
        work=leading.run,
    )


if __name__ == "__main__":
    sys.exit(main())

"""How every service begins: its log, its loop, and a database that is there and safe."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from shared.folds.errors import Unavailable
from shared.platform import program, telemetry, tracing
from shared.platform.otel import release
from shared.platform.postgres import Reads, UnsafeDatabase, describe, refuse_old, refuse_unsafe
from shared.platform.settings import CannotStart, ProcessSettings

log = telemetry.logger(__name__)

RETRY_S = 0.25
REPEAT_LOG_S = 10.0


def run(
    service: str,
    settings: ProcessSettings,
    main: Callable[[], Coroutine[Any, Any, None]],
    *,
    refuses: tuple[type[Exception], ...] = (),
) -> int:
    """Runs a process to its end; returns its exit code. What it `refuses` to run on is told, not thrown."""
    # Otherwise gRPC prints a line for each failed handshake, which anybody can cause.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    telemetry.configure(settings.log_level, service=service)
    log.info("process_starts", version=release(), settings=settings.effective())
    tracing.configure(service)
    unfit: tuple[type[Exception], ...] = (UnsafeDatabase, CannotStart, *refuses)
    try:
        program.run(main, fast_loop=settings.uvloop)
    except unfit as error:
        log.error("process_refuses_to_run", error=str(error))  # noqa: TRY400 (a setting, not a defect)
        return 1
    finally:
        tracing.shutdown()
    return 0


async def until_safe(reads: Reads, *, tables: Iterable[str] = (), written: Iterable[str] = ()) -> None:
    """Waits for the database and its tables, and says so. The tables `written` are those that the role should write.

    Raises UnsafeDatabase if the role could write the others or see past their policies, a commit is not durable or the server is
    too old.
    """
    told_at = -REPEAT_LOG_S
    while True:
        try:
            async with reads.connection() as connection:
                refuse_old(connection)  # nobody migrates the tables of such a server, which would be waited for
                for table in written:
                    await connection.execute("SELECT %s::text::regclass", (table,))
                return await refuse_unsafe(connection, tables=tables)
        except Unavailable as error:
            if time.monotonic() - told_at > REPEAT_LOG_S:
                told_at = time.monotonic()
                log.info("waiting_for_database", error=describe(error.__cause__ or error))
            await asyncio.sleep(RETRY_S)

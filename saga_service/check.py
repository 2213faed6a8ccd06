"""`python -m saga_service.check [--histories N]`: whether all processes in flight go on under this release's code.

Run it before a deployment, with the settings of the saga service. It reads the saga database and, for the histories, the line,
and writes nothing. It prints JSON, and exits with 1 if there is a mismatch. With 2, 3 and 4 nothing is known of the processes: it
is not set up or their code cannot be imported, the database or the write service does not answer, the check itself failed.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import sys
import time
import traceback
from collections.abc import Iterable
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any

import orjson
import psycopg
from pydantic import Field

from shared.folds.process import ProcessDefinition
from shared.folds.upcasting import NONE, Upcasters
from shared.line.follower import Line, LineAway
from shared.line.lookup import events_at
from shared.line.sources import StoreLine
from shared.platform import postgres
from shared.platform.peers import WriteServicePeer
from shared.platform.settings import ProcessSettings, load
from shared.platform.urls import DatabaseUrl
from shared.processes import live
from shared.processes.compatibility import check
from shared.processes.process_type import process_types
from shared.processes.replay import positions, replay
from shared.rpc.client import channel

MISMATCHES_MAX = 1000

Definitions = Iterable[ProcessDefinition[Any]]


class SagaDatabase(ProcessSettings):
    """Where processes are."""

    database_url: DatabaseUrl
    """The saga database's URL."""


class EventStore(WriteServicePeer):
    """Where the events are that histories name."""

    token_file: Path
    """A file with a token of role `reader`."""
    shard: int = Field(1, ge=1)
    """The shard of the processes."""


async def look(
    database_url: str,
    definitions: Definitions,
    upcasters: Upcasters = NONE,
    *,
    line: Line | None = None,
    histories_max: int | None = None,
) -> dict[str, Any]:
    """How many processes are in flight, and those that would not go on: MISMATCHES_MAX of them at the most.

    With a line, the histories of the `histories_max` oldest, or of all, are replayed too. Raises LineAway.
    """
    kinds = process_types(definitions, upcasters)
    began, checked, replayed, failed = time.monotonic(), 0, 0, 0
    mismatches: list[dict[str, str]] = []
    connection = await postgres.connect(database_url, application_name="foldline-process-check")
    async with connection, aclosing(live.pages(connection, histories_max=histories_max if line else 0)) as pages:
        async for page in pages:
            events = await events_at(line, [it for case in page for it in positions(case)]) if line else {}
            for case in page:
                checked += 1
                mismatch = check(kinds, case)
                if mismatch is None and case.history is not None:
                    replayed += 1
                    mismatch = replay(kinds, case, events)
                if mismatch is None:
                    continue
                failed += 1
                if len(mismatches) < MISMATCHES_MAX:
                    tenant, type_, process_id = case.process.key
                    name = {"tenant": tenant, "type": type_, "process_id": process_id, "phase": case.process.phase}
                    mismatches.append({**name, "what": mismatch.what, "where": mismatch.where})
    seconds = round(time.monotonic() - began, 2)
    return {"checked": checked, "replayed": replayed, "failed": failed, "seconds": seconds, "mismatches": mismatches}


def definitions() -> tuple[Definitions, Upcasters]:
    """The types of processes of this release, and the upcasters of its events. Raises whatever importing them raises."""
    found: Definitions = importlib.import_module("saga_service.registry").PROCESSES
    upcasters: Upcasters = importlib.import_module("upcasters").UPCASTERS
    return found, upcasters


async def _look(
    database_url: str, settings: EventStore | None, found: tuple[Definitions, Upcasters], histories_max: int | None
) -> dict[str, Any]:
    async with AsyncExitStack() as stack:
        line = None
        if settings is not None:
            write = await stack.enter_async_context(channel(settings.write_address, tls=settings.write_tls))
            line = StoreLine(write, settings.token_file, settings.shard)
        return await look(database_url, *found, line=line, histories_max=histories_max)


def main() -> int:
    """Checks, prints and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m saga_service.check")
    parser.add_argument("--histories", type=int, metavar="N", help="replay the N oldest histories alone; 0 reads no events")
    histories_max = parser.parse_args().histories
    if histories_max is not None and histories_max < 0:
        parser.error("--histories takes a number from 0 on")
    database_url = load(SagaDatabase, "saga_service.check", arguments=()).database_url.get_secret_value()
    settings = None if histories_max == 0 else load(EventStore, "saga_service.check", arguments=())
    try:
        release = definitions()
    except Exception as error:  # noqa: BLE001 (a module may raise anything)
        where = traceback.extract_tb(error.__traceback__)[-1]
        sys.stderr.write(
            f"the code of the processes cannot be imported: {type(error).__name__}: {error} ({where.filename}:{where.lineno})\n"
        )
        return 2
    try:
        found = asyncio.run(_look(database_url, settings, release, histories_max))
    except psycopg.Error as error:
        sys.stderr.write(f"the saga database cannot be read: {str(error).strip()}\n")
        return 3
    except LineAway as error:
        sys.stderr.write(f"the events of histories cannot be read: {error}; --histories 0 does without them\n")
        return 3
    except Exception:  # noqa: BLE001 (the interpreter's exit code would be 1, that of a mismatch)
        traceback.print_exc()
        return 4
    sys.stdout.write(orjson.dumps(found).decode() + "\n")
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())

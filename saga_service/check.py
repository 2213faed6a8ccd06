"""`python -m saga_service.check [--histories N]`: whether all processes in flight go on under this release's code.

Run it before a deployment, with the settings of the saga service. It reads the saga database and, for the histories, the line,
and writes nothing. It prints JSON, and exits with 1 if there is a mismatch, with 2 if it is not set up, with 3 if the
database or the write service does not answer, with 4 if the check itself failed: then nothing is known of the processes.
"""

from __future__ import annotations

import argparse
import asyncio
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

from saga_service.registry import PROCESSES
from shared.folds.process import ProcessDefinition
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
from upcasters import UPCASTERS

MISMATCHES_MAX = 1000


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
    definitions: Iterable[ProcessDefinition[Any]] = PROCESSES,
    *,
    line: Line | None = None,
    histories_max: int | None = None,
) -> dict[str, Any]:
    """How many processes are in flight, and those that would not go on: MISMATCHES_MAX of them at the most.

    With a line, the histories of the `histories_max` oldest, or of all, are replayed too. Raises LineAway.
    """
    kinds = process_types(definitions, UPCASTERS)
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


async def _look(database_url: str, settings: EventStore | None, histories_max: int | None) -> dict[str, Any]:
    async with AsyncExitStack() as stack:
        line = None
        if settings is not None:
            write = await stack.enter_async_context(channel(settings.write_address, tls=settings.write_tls))
            line = StoreLine(write, settings.token_file, settings.shard)
        return await look(database_url, line=line, histories_max=histories_max)


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
        found = asyncio.run(_look(database_url, settings, histories_max))
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

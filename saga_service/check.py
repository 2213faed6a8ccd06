"""`python -m saga_service.check`: whether all processes in flight go on under this release's code. Run it before a deployment.

It reads the saga database of FOLDLINE_DATABASE_URL and writes nothing. It prints JSON, and exits with 1 if a process would not go
on, with 2 without a database.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Iterable
from contextlib import aclosing
from typing import Any

import orjson
import psycopg

from saga_service.registry import PROCESSES
from shared.folds.process import ProcessDefinition
from shared.platform import postgres
from shared.processes.compatibility import check
from shared.processes.live import cases
from shared.processes.process_type import process_types
from upcasters import UPCASTERS

MISMATCHES_MAX = 1000


async def look(database_url: str, definitions: Iterable[ProcessDefinition[Any]] = PROCESSES) -> dict[str, Any]:
    """How many processes are in flight, and those that would not go on: MISMATCHES_MAX of them at the most."""
    kinds = process_types(definitions, UPCASTERS)
    began, checked, failed = time.monotonic(), 0, 0
    mismatches: list[dict[str, str]] = []
    connection = await postgres.connect(database_url, application_name="foldline-process-check")
    async with connection, aclosing(cases(connection)) as found:
        async for case in found:
            checked += 1
            if (mismatch := check(kinds, case)) is None:
                continue
            failed += 1
            if len(mismatches) < MISMATCHES_MAX:
                tenant, type_, process_id = case.process.key
                name = {"tenant": tenant, "type": type_, "process_id": process_id, "phase": case.process.phase}
                mismatches.append({**name, "what": mismatch.what, "where": mismatch.where})
    seconds = round(time.monotonic() - began, 2)
    return {"checked": checked, "failed": failed, "seconds": seconds, "mismatches": mismatches}


def main() -> int:
    """Checks, prints and returns the exit code."""
    database_url = os.environ.get("FOLDLINE_DATABASE_URL")
    if not database_url:
        sys.stderr.write("FOLDLINE_DATABASE_URL is not set: the saga database's URL\n")
        return 2
    try:
        found = asyncio.run(look(database_url))
    except psycopg.OperationalError as error:
        sys.stderr.write(f"the saga database does not answer: {str(error).strip()}\n")
        return 3
    sys.stdout.write(orjson.dumps(found).decode() + "\n")
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())

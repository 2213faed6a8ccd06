"""The ceiling of writes: one psycopg connection and the fewest statements that leave the same rows in the same tables.

`commit`: one autocommitted statement with one event and its command. `append`: one with a hundred of each, the shard's
lock taken first, arrays packed in binary by hand. Both insert straight into the tables, as their owner: no function, no
checks of versions and ids, nothing read. Rows are made before the clock runs, so that nothing but packing them, sending
them and making them durable is measured. Same server and tables, same columns, keys and indexes, same fsync.

Reads orders as lines of JSON: `{"kind": "append", "seconds": 1.5, "batch": 100, "accounts": 1000}`.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from itertools import islice

import psycopg

from shared.platform.packing import Packed, PackedDumper, blobs, int8s, texts, timestamps, uuids
from tests.bench.workload import TENANT, TRACEPARENT, USER, BareRow, bare_rows

EVENT = "bank.v1.MoneyDeposited"
COMMAND = "bank.v1.DepositMoneyRequest"

COMMIT = f"""
WITH e AS (
  INSERT INTO events (position, event_id, tenant, category, aggregate_id, version, type, payload, recorded_at, metadata)
  VALUES (%b, %b, '{TENANT}', 'account', %b, %b, '{EVENT}', %b, now(), %b))
INSERT INTO commands (
  tenant, command_id, type, category, aggregate_id, fingerprint, payload, status, user_id, on_behalf_of, correlation_id,
  traceparent, received_at, finished_at, version, events_appended, position, head)
VALUES (
  '{TENANT}', %b, '{COMMAND}', 'account', %b, %b, %b, 'completed', '{USER}', '', %b,
  '{TRACEPARENT}', %b, now(), %b, 1, %b, %b)
"""

APPEND = f"""
WITH locked AS MATERIALIZED (
  SELECT pg_advisory_xact_lock(1, 1)
), e AS (
  INSERT INTO events (position, event_id, tenant, category, aggregate_id, version, type, payload, recorded_at, metadata)
  SELECT r.position, r.event_id, r.tenant, 'account', r.aggregate_id, r.version, '{EVENT}', r.payload, now(), r.metadata
  FROM locked, unnest(%b, %b, %b, %b, %b, %b, %b) AS r(position, event_id, tenant, aggregate_id, version, payload, metadata)
)
INSERT INTO commands (
  tenant, command_id, type, category, aggregate_id, fingerprint, payload, status, user_id, on_behalf_of, correlation_id,
  traceparent, received_at, finished_at, version, events_appended, position, head)
SELECT r.tenant, r.command_id, '{COMMAND}', 'account', r.aggregate_id, r.fingerprint, r.payload, 'completed', r.user_id, '',
  r.command_id, r.traceparent, r.received_at, now(), r.version, 1, r.position, r.position
FROM locked, unnest(%b, %b, %b, %b, %b, %b, %b, %b, %b, %b)
  AS r(tenant, command_id, aggregate_id, fingerprint, payload, user_id, traceparent, received_at, version, position)
"""


class BareWriter:
    """One connection, and where the line and the accounts' streams are."""

    def __init__(self, database_url: str) -> None:
        self._connection = psycopg.connect(database_url, autocommit=True)
        self._connection.prepare_threshold = 0
        self._connection.adapters.register_dumper(Packed, PackedDumper)
        self._position = 1
        self._version = 1

    def close(self) -> None:
        """Ends the connection."""
        self._connection.close()

    def rows(self, accounts: int, how_many: int) -> Iterator[BareRow]:
        """The next rows of the line: one deposit on each account, then again."""
        rows = bare_rows(accounts, self._position, self._version)
        # Accounts whose turn has not come leave a gap in their versions; nothing here minds.
        self._position, self._version = self._position + how_many, self._version + how_many // accounts + 1
        return islice(rows, how_many)

    def commit(self, row: BareRow) -> None:
        """One event and one command, durable when it returns."""
        self._connection.execute(
            COMMIT,
            (
                *(row.position, row.event_id, row.account_id, row.version, row.event, row.metadata),
                *(row.command_id, row.account_id, row.fingerprint, row.command, row.command_id),
                *(row.now, row.version, row.position, row.position),
            ),
        )

    def append(self, rows: list[BareRow]) -> None:
        """Many events and commands in one statement, durable when it returns."""
        tenant, account_id = texts([TENANT] * len(rows)), texts([row.account_id for row in rows])
        position, version = int8s([row.position for row in rows]), int8s([row.version for row in rows])
        self._connection.execute(
            APPEND,
            (
                position,
                uuids([row.event_id for row in rows]),
                tenant,
                account_id,
                version,
                blobs([row.event for row in rows]),
                blobs([row.metadata for row in rows]),
                tenant,
                uuids([row.command_id for row in rows]),
                account_id,
                blobs([row.fingerprint for row in rows]),
                blobs([row.command for row in rows]),
                texts([USER] * len(rows)),
                texts([TRACEPARENT] * len(rows)),
                timestamps([row.now for row in rows]),
                version,
                position,
            ),
        )

    def run(self, kind: str, seconds: float, batch: int, accounts: int) -> dict[str, float]:
        """Writes as fast as it goes, for so long; rows are made in between, with the clock stopped."""
        size = batch if kind == "append" else 1
        at_once = 100 if kind == "append" else 2000
        took_s: list[float] = []
        all_s = cpu_s = 0.0
        while all_s < seconds:
            made = iter(list(self.rows(accounts, size * at_once)))
            before = _cpu_s()
            while all_s < seconds and (rows := list(islice(made, size))):
                began = time.perf_counter()
                if kind == "append":
                    self.append(rows)
                else:
                    self.commit(rows[0])
                took_s.append(time.perf_counter() - began)
                all_s += took_s[-1]
            cpu_s += _cpu_s() - before
        done = size * len(took_s)
        return {
            "done": done,
            "sent": done,
            "per_s": done / all_s,
            "p50_ms": 1000 * statistics.median(took_s),
            "cpu_us": 1e6 * cpu_s / done,
        }


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Carries out orders until standard input ends."""
    writer = BareWriter(sys.argv[1])
    for line in sys.stdin:
        sys.stdout.write(json.dumps(writer.run(**json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

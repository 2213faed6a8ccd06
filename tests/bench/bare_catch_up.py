"""The ceiling of projections: one process, two psycopg connections, one loop over batches of 500 events.

It reads the line from the write database, parses each payload, folds it and upserts the rows that changed into the same
tables as the projector, with the checkpoint, in one transaction a batch. It leads alone and starts from nothing, so it
keeps all rows in memory and never reads one; there is no gRPC, no fence and no proof of anything.

`python -m tests.bench.bare_catch_up WRITE_URL READ_URL` prints one line of JSON.
"""

from __future__ import annotations

import json
import resource
import sys
import time
import unicodedata
from collections.abc import Callable, Collection
from datetime import datetime
from typing import Any

import psycopg

from bank.v1 import account_pb2, person_pb2
from shared.platform.packing import Packed, PackedDumper, int4s, int8s, texts, timestamps

BATCH = 500

READ = """
SELECT position, event_id, tenant, version, type, payload, recorded_at FROM events WHERE position > %b ORDER BY position LIMIT %b
"""
MOVE = "UPDATE checkpoints SET position = %b, event_id = %b, moved_at = clock_timestamp() WHERE name = 'bare' AND shard = 1"

Row = tuple[Any, ...]


def _numerics(values: Collection[int]) -> Packed:
    return texts([str(value) for value in values])


class Sink:
    """A table, its rows and the keys of those that changed since the last flush."""

    def __init__(self, name: str, columns: str, keys: int, packs: list[Callable[[Any], Packed]]) -> None:
        names = columns.split()
        kept = ", ".join(f"{each} = excluded.{each}" for each in names[keys:])
        values = ", ".join(f"r.{each}::numeric" if each == "total_minor" else f"r.{each}" for each in names)
        self._upsert = (
            f"INSERT INTO {name} ({', '.join(names)}) SELECT {values} "
            f"FROM unnest({', '.join(['%b'] * len(names))}) AS r({', '.join(names)}) "
            f"ON CONFLICT ({', '.join(names[:keys])}) DO UPDATE SET {kept}"
        )
        self._packs = packs
        self.rows: dict[Row, Row] = {}
        self.changed: dict[Row, Row] = {}

    def put(self, key: Row, row: Row) -> None:
        """A row as it is now."""
        self.rows[key] = self.changed[key] = row

    def flush(self, connection: psycopg.Connection[Any]) -> None:
        """Writes what changed."""
        if self.changed:
            columns = zip(*self.changed.values(), strict=True)
            packed = [pack(column) for pack, column in zip(self._packs, columns, strict=True)]
            connection.execute(self._upsert.encode(), packed)
            self.changed = {}


class Fold:
    """All four tables, and what each event does to them."""

    def __init__(self) -> None:
        self.people = Sink(
            "people",
            "tenant person_id name name_folded registered_at open_account_count version status",
            2,
            [texts, texts, texts, texts, timestamps, int4s, int8s, texts],
        )
        self.totals = Sink("person_totals", "tenant person_id currency total_minor", 3, [texts, texts, texts, _numerics])
        self.accounts = Sink(
            "accounts",
            "tenant account_id owner_id name currency balance_minor status opened_at version",
            2,
            [texts, texts, texts, texts, texts, int8s, texts, timestamps, int8s],
        )
        self.movements = Sink(
            "movements",
            "tenant account_id version amount_minor balance_after_minor moved_at",
            3,
            [texts, texts, int8s, int8s, int8s, timestamps],
        )
        self.sinks = (self.people, self.totals, self.accounts, self.movements)

    def apply(self, tenant: str, version: int, type_name: str, payload: bytes, at: datetime) -> None:
        """Folds one event; raises KeyError for one whose row is not there, or that it does not know."""
        match type_name:
            case "bank.v1.MoneyDeposited":
                deposited = account_pb2.MoneyDeposited.FromString(payload)
                self._moved(deposited, deposited.amount_minor, tenant, version, at)
            case "bank.v1.MoneyWithdrawn":
                withdrawn = account_pb2.MoneyWithdrawn.FromString(payload)
                self._moved(withdrawn, -withdrawn.amount_minor, tenant, version, at)
            case "bank.v1.PersonRegistered":
                person = person_pb2.PersonRegistered.FromString(payload)
                folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", person.name).casefold())
                row = (tenant, person.person_id, person.name, folded, at, 0, version, "active")
                self.people.put((tenant, person.person_id), row)
            case "bank.v1.AccountAttached":
                key = (tenant, person_pb2.AccountAttached.FromString(payload).person_id)
                before = self.people.rows[key]
                self.people.put(key, (*before[:5], before[5] + 1, version, *before[7:]))
            case "bank.v1.AccountOpened":
                opened = account_pb2.AccountOpened.FromString(payload)
                key = (tenant, opened.account_id)
                self.accounts.put(key, (*key, opened.owner_id, opened.name, opened.currency, 0, "active", at, version))
                total = (tenant, opened.owner_id, opened.currency)
                self.totals.put(total, self.totals.rows.get(total) or (*total, 0))
            case _:
                raise KeyError(type_name)

    def _moved(self, event: Any, amount_minor: int, tenant: str, version: int, at: datetime) -> None:
        account_id, balance = event.account_id, event.balance_after_minor
        key = (tenant, account_id)
        before = self.accounts.rows[key]
        self.accounts.put(key, (*before[:5], balance, *before[6:8], version))
        movement = (tenant, account_id, version)
        self.movements.changed[movement] = (*movement, amount_minor, balance, at)
        total = (tenant, event.owner_id, event.currency)
        self.totals.put(total, (*total, self.totals.rows[total][3] + amount_minor))


def catch_up(write_url: str, read_url: str) -> dict[str, float]:
    """Follows the line to its end; how many events, how long, at what cost."""
    with psycopg.connect(write_url, autocommit=True) as source, psycopg.connect(read_url) as target:
        source.prepare_threshold = target.prepare_threshold = 0
        target.adapters.register_dumper(Packed, PackedDumper)
        target.execute("INSERT INTO checkpoints (name, shard) VALUES ('bare', 1)")
        target.commit()
        fold, position = Fold(), 0
        before, began = _cpu_s(), time.perf_counter()
        with source.cursor(binary=True) as cursor:
            while events := cursor.execute(READ, (position, BATCH)).fetchall():
                for position, event_id, tenant, version, type_name, payload, at in events:  # noqa: B007 (used below)
                    fold.apply(tenant, version, type_name, payload, at)
                target.execute(MOVE, (position, str(event_id)))
                for sink in fold.sinks:
                    sink.flush(target)
                target.commit()
        took_s = time.perf_counter() - began
    return {"done": position, "sent": position, "per_s": position / took_s, "cpu_us": 1e6 * (_cpu_s() - before) / position}


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    print(json.dumps(catch_up(sys.argv[1], sys.argv[2])))

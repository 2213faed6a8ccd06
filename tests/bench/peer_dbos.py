"""The peer of `transfers_vs_dbos`: DBOS runs transfers of the same four steps, each durable by itself.

A process of the bench like the others, orders and answers as lines of JSON, but run by the interpreter of
`.venv-bench`: it knows nothing of Foldline and Foldline nothing of it.

What was chosen, by trying each once for 600 transfers among 1,000 accounts, on two cores that were shared (transfers/s):

- `@DBOS.step` with one psycopg statement each, so one commit of the application and one of DBOS's record: 69-83. A step
  may run again after a crash, so each statement says for itself that it happens once. The same through SQLAlchemy: 64.
- `datasource.transaction`, which DBOS recommends where statements cannot say so: 42. It reads and writes more for each.
- Steps and workflows as coroutines: 45-61.
- Workflows at once: 8 is best (80-83); 4: 50-57; 16: 69-71; with transactions 8: 45, 16: 42, 64: 32. So 8 callers here,
  though Foldline is given 64.
- One process: two beside each other, 8 workflows each, made 38-41 each, together no more than one.
- Started by `DBOS.start_workflow` and awaited by the handle, in the same process: no queue, whose polling costs time, no
  server and no RPC in front of it. Foldline's transfers come over gRPC, with tokens, and are seen in another process.
- Pool of DBOS's own tables: its default of 20. LISTEN/NOTIFY on, as it is by default. fsync and synchronous_commit on.
"""

from __future__ import annotations

import json
import random
import resource
import statistics
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import psycopg
from dbos import DBOS

TABLES = """
CREATE TABLE accounts (id uuid PRIMARY KEY, balance bigint NOT NULL CHECK (balance >= 0));
CREATE TABLE transfers (
    id uuid PRIMARY KEY, source uuid NOT NULL, target uuid NOT NULL, amount bigint NOT NULL, status text NOT NULL
);
CREATE TABLE movements (transfer_id uuid, account_id uuid, amount bigint, PRIMARY KEY (transfer_id, account_id))
"""
START = "INSERT INTO transfers VALUES (%s, %s, %s, %s, 'started') ON CONFLICT DO NOTHING"
MOVE = """
WITH once AS (INSERT INTO movements VALUES (%s, %s, %s) ON CONFLICT DO NOTHING RETURNING amount)
UPDATE accounts SET balance = balance + once.amount FROM once WHERE id = %s
"""
COMPLETE = "UPDATE transfers SET status = 'completed' WHERE id = %s"
BALANCE = 10**12
AT_ONCE = 8

_url = sys.argv[1]
_of_thread = threading.local()


def _execute(statement: str, *values: object) -> None:
    """One statement, one commit, through this thread's connection: DBOS's threads are few and stay."""
    if not hasattr(_of_thread, "connection"):
        _of_thread.connection = psycopg.connect(_url, autocommit=True)
    _of_thread.connection.execute(statement, values)


@DBOS.step()
def start(transfer_id: str, source: str, target: str, amount: int) -> None:
    """Records the transfer."""
    _execute(START, transfer_id, source, target, amount)


@DBOS.step()
def debit(transfer_id: str, source: str, amount: int) -> None:
    """Takes the money."""
    _execute(MOVE, transfer_id, source, -amount, source)


@DBOS.step()
def credit(transfer_id: str, target: str, amount: int) -> None:
    """Gives the money."""
    _execute(MOVE, transfer_id, target, amount, target)


@DBOS.step()
def complete(transfer_id: str) -> None:
    """Says that it is done."""
    _execute(COMPLETE, transfer_id)


@DBOS.workflow()
def transfer(transfer_id: str, source: str, target: str, amount: int) -> None:
    """The four steps."""
    start(transfer_id, source, target, amount)
    debit(transfer_id, source, amount)
    credit(transfer_id, target, amount)
    complete(transfer_id)


@dataclass(slots=True, kw_only=True)
class Order:
    """What is to be done. `kind` is sustained or paced."""

    kind: str
    transfers: int
    # Transfers a second, if paced.
    per_s: float = 50.0


class Peer:
    """Accounts, and transfers among them."""

    def __init__(self, accounts: int) -> None:
        self._accounts = [str(uuid.uuid4()) for _ in range(accounts)]
        self._completed = 0
        with psycopg.connect(_url) as connection:
            connection.execute(TABLES)
            with connection.cursor() as cursor:
                cursor.executemany("INSERT INTO accounts VALUES (%s, %s)", [(each, BALANCE) for each in self._accounts])

    def carry_out(self, order: Order) -> dict[str, float]:
        """Runs so many transfers and says how long each took, from when it was due."""
        cpu_before, began = _cpu_s(), time.perf_counter()
        due = [began + nth / order.per_s if order.kind == "paced" else None for nth in range(order.transfers)]
        # Paced: a thread for each that may be under way, also when they come faster than they go.
        with ThreadPoolExecutor(AT_ONCE if order.kind == "sustained" else 64) as callers:
            took_s = sorted(callers.map(self._one, due))
        lasted_s = time.perf_counter() - began
        self._completed += order.transfers
        self._audit()
        return {
            "done": order.transfers,
            "sent": order.transfers,
            "per_s": order.transfers / lasted_s,
            "p50_ms": 1000 * statistics.median(took_s),
            "p99_ms": 1000 * took_s[int(len(took_s) * 0.99)],
            "cpu_us": 1e6 * (_cpu_s() - cpu_before) / order.transfers,
        }

    def _one(self, due: float | None) -> float:
        began = time.perf_counter() if due is None else due
        time.sleep(max(began - time.perf_counter(), 0))
        source, target = random.sample(self._accounts, 2)
        DBOS.start_workflow(transfer, str(uuid.uuid4()), source, target, 1).get_result()
        return time.perf_counter() - began

    def _audit(self) -> None:
        """Raises RuntimeError unless every transfer is complete and the money all there."""
        with psycopg.connect(_url) as connection:
            count = "SELECT (SELECT count(*) FROM transfers WHERE status = 'completed'), (SELECT sum(balance) FROM accounts)"
            found = connection.execute(count).fetchone()
        if found != (self._completed, BALANCE * len(self._accounts)):
            raise RuntimeError(f"{self._completed} transfers ended, and the tables say {found}")


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Carries out orders until standard input ends."""
    peer = Peer(accounts=1000)
    DBOS(config={"name": "peer", "system_database_url": _url, "log_level": "ERROR"})
    DBOS.launch()
    try:
        for line in sys.stdin:
            sys.stdout.write(json.dumps(peer.carry_out(Order(**json.loads(line)))) + "\n")
            sys.stdout.flush()
    finally:
        DBOS.destroy()


if __name__ == "__main__":
    main()

"""What the peers of the bench have in common: accounts, the statements of a transfer's four steps, and the orders of the bench.

A peer is a process of the bench like the others, orders and answers as lines of JSON, but run by the interpreter of
`.venv-bench`: it knows nothing of Foldline and Foldline nothing of it.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import psycopg

TABLES = """
CREATE TABLE accounts (id uuid PRIMARY KEY, balance bigint NOT NULL CHECK (balance >= 0));
CREATE TABLE transfers (
    id uuid PRIMARY KEY, source uuid NOT NULL, target uuid NOT NULL, amount bigint NOT NULL, status text NOT NULL
);
CREATE TABLE movements (transfer_id uuid, account_id uuid, amount bigint, PRIMARY KEY (transfer_id, account_id))
"""
# A step may run again after a crash, so each statement says for itself that it happens once.
START = "INSERT INTO transfers VALUES (%s, %s, %s, %s, 'started') ON CONFLICT DO NOTHING"
MOVE = """
WITH once AS (INSERT INTO movements VALUES (%s, %s, %s) ON CONFLICT DO NOTHING RETURNING amount)
UPDATE accounts SET balance = balance + once.amount FROM once WHERE id = %s
"""
COMPLETE = "UPDATE transfers SET status = 'completed' WHERE id = %s"
BALANCE = 10**12


@dataclass(slots=True, kw_only=True)
class Order:
    """What is to be done. `kind` is sustained or paced."""

    kind: str
    transfers: int
    # Transfers a second, if paced.
    per_s: float = 50.0
    # Transfers at once, if sustained.
    callers: int = 8


class Peer:
    """Accounts, and transfers among them."""

    def __init__(
        self,
        url: str,
        *,
        accounts: int,
        transfer: Callable[[str, str, str, int], object],
        cpu_s: Callable[[], float],
    ) -> None:
        """`transfer` carries one out and returns when it is complete. `cpu_s` is the processor time that the peer has taken."""
        self._url, self._transfer, self._cpu_s = url, transfer, cpu_s
        self._accounts = [str(uuid.uuid4()) for _ in range(accounts)]
        self._completed = 0
        with psycopg.connect(url) as connection:
            connection.execute(TABLES)
            with connection.cursor() as cursor:
                cursor.executemany("INSERT INTO accounts VALUES (%s, %s)", [(each, BALANCE) for each in self._accounts])

    def serve(self) -> None:
        """Carries out orders until standard input ends."""
        for line in sys.stdin:
            sys.stdout.write(json.dumps(self.carry_out(Order(**json.loads(line)))) + "\n")
            sys.stdout.flush()

    def carry_out(self, order: Order) -> dict[str, float]:
        """Runs so many transfers and says how long each took, from when it was due."""
        cpu_before, began = self._cpu_s(), time.perf_counter()
        due = [began + nth / order.per_s if order.kind == "paced" else None for nth in range(order.transfers)]
        # Paced: a thread for each that may be under way, also when they come faster than they go.
        with ThreadPoolExecutor(order.callers if order.kind == "sustained" else 64) as callers:
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
            "cpu_us": 1e6 * (self._cpu_s() - cpu_before) / order.transfers,
        }

    def _one(self, due: float | None) -> float:
        began = time.perf_counter() if due is None else due
        time.sleep(max(began - time.perf_counter(), 0))
        source, target = random.sample(self._accounts, 2)
        self._transfer(str(uuid.uuid4()), source, target, 1)
        return time.perf_counter() - began

    def _audit(self) -> None:
        """Raises RuntimeError unless every transfer is complete and the money all there."""
        with psycopg.connect(self._url) as connection:
            count = "SELECT (SELECT count(*) FROM transfers WHERE status = 'completed'), (SELECT sum(balance) FROM accounts)"
            found = connection.execute(count).fetchone()
        if found != (self._completed, BALANCE * len(self._accounts)):
            raise RuntimeError(f"{self._completed} transfers ended, and the tables say {found}")

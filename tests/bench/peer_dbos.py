"""The peer of `transfers_vs_dbos`: DBOS runs transfers of the same four steps, each durable by itself.

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

import resource
import sys
import threading

import psycopg
from dbos import DBOS

from tests.bench.peer import COMPLETE, MOVE, START, Peer

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


def _carry_out(transfer_id: str, source: str, target: str, amount: int) -> None:
    DBOS.start_workflow(transfer, transfer_id, source, target, amount).get_result()


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Carries out orders until standard input ends."""
    peer = Peer(_url, accounts=1000, transfer=_carry_out, cpu_s=_cpu_s)
    DBOS(config={"name": "peer", "system_database_url": _url, "log_level": "ERROR"})
    DBOS.launch()
    try:
        peer.serve()
    finally:
        DBOS.destroy()


if __name__ == "__main__":
    main()

"""The peer of `transfers_vs_restate`: Restate runs transfers of the same four steps, each durable by itself.

Three processes: Restate's server, which keeps the journals (its log is flushed to disk before an answer, as it is by
default); the service, with the four steps as `ctx.run`, one psycopg statement and one commit each; and this one, which calls
the server over HTTP and gets the answer when the transfer is complete. Foldline's transfers come over gRPC, with tokens, and are
seen in another process.

Restate's defaults, but for its telemetry, which is off. How many transfers at once suit it best is tried before anything counts
(`versus_peers.py`). Two workers of the service beside each other made no more than one: 46, 58 and 46 transfers a second at 32,
64 and 128 callers by one, 41, 54 and 19 by two, on two cores that many others shared.

Its licence (BSL 1.1) lets anybody use it, measuring included; it is no part of Foldline.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psycopg
import restate

from tests.bench.peer import COMPLETE, MOVE, START, Peer

CONNECTIONS = 8
READY_S = 60.0

ONCE = restate.RunOptions[None]()

transfers = restate.Service("transfers")


class Connections:
    """Connections of the service to the database: a statement waits until one is free."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._free: asyncio.Queue[psycopg.AsyncConnection[object]] | None = None

    async def execute(self, statement: str, *values: object) -> None:
        """One statement, one commit."""
        if self._free is None:
            free = self._free = asyncio.Queue()
            for _ in range(CONNECTIONS):
                free.put_nowait(await psycopg.AsyncConnection.connect(self._url, autocommit=True))
        connection = await self._free.get()
        try:
            await connection.execute(statement, values)
        finally:
            self._free.put_nowait(connection)


_tables = Connections(os.environ.get("PEER_URL", ""))


@transfers.handler()
async def transfer(ctx: restate.Context, order: dict[str, object]) -> None:
    """The four steps."""
    id_, source, target, amount = order["id"], order["source"], order["target"], int(str(order["amount"]))
    await ctx.run_typed("start", _tables.execute, ONCE, START, id_, source, target, amount)
    await ctx.run_typed("debit", _tables.execute, ONCE, MOVE, id_, source, -amount, source)
    await ctx.run_typed("credit", _tables.execute, ONCE, MOVE, id_, target, amount, target)
    await ctx.run_typed("complete", _tables.execute, ONCE, COMPLETE, id_)


app = restate.app([transfers])


class Engine:
    """Restate's server and the service beside it, until closed."""

    def __init__(self, server: str, url: str, folder: str) -> None:
        ingress, admin, node, service = (_free_port() for _ in range(4))
        environment = {
            **os.environ,
            "RESTATE_DISABLE_TELEMETRY": "true",
            "RESTATE_LISTEN_MODE": "tcp",
            "RESTATE_BIND_IP": "127.0.0.1",
            "RESTATE_BIND_PORT": str(node),
            "RESTATE_INGRESS__BIND_PORT": str(ingress),
            "RESTATE_ADMIN__BIND_PORT": str(admin),
            "RESTATE_NODE_NAME": "peer",
            "RESTATE_BASE_DIR": folder,
            "RESTATE_LOG_FILTER": "warn",
        }
        log = (Path(folder) / "log").open("wb")
        serving = [sys.executable, "-m", "hypercorn", "tests.bench.peer_restate:app", "--bind", f"127.0.0.1:{service}"]
        self.children = [
            subprocess.Popen([server, "--no-logo"], env=environment, stdout=log, stderr=log),  # noqa: S603 (the lock's)
            subprocess.Popen(serving, env={**os.environ, "PEER_URL": url}, stdout=log, stderr=log),  # noqa: S603 (ours)
        ]
        self.ingress = ingress
        self._of_thread = threading.local()
        self._register(admin, service)

    def _register(self, admin: int, service: int) -> None:
        """Tells the server of the service, as soon as both are there. Raises RuntimeError if they do not come."""
        until = time.monotonic() + READY_S
        content = json.dumps({"uri": f"http://127.0.0.1:{service}"})
        while True:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", admin, timeout=10)
                connection.request("POST", "/deployments", content, {"content-type": "application/json"})
                answer = connection.getresponse()
                if answer.status in (200, 201):
                    return
                why = f"{answer.status} {answer.read(300)!r}"
            except OSError as error:
                why = str(error)
            if time.monotonic() > until:
                raise RuntimeError(f"Restate did not start: {why}")
            time.sleep(0.2)

    def transfer(self, transfer_id: str, source: str, target: str, amount: int) -> None:
        """Carries one out, over this thread's connection. Raises RuntimeError if it fails."""
        if not hasattr(self._of_thread, "connection"):
            self._of_thread.connection = http.client.HTTPConnection("127.0.0.1", self.ingress, timeout=60)
        order = json.dumps({"id": transfer_id, "source": source, "target": target, "amount": amount})
        self._of_thread.connection.request("POST", "/transfers/transfer", order, {"content-type": "application/json"})
        answer = self._of_thread.connection.getresponse()
        told = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{answer.status} {told[:300]!r}")

    def cpu_s(self) -> float:
        """The processor time of server, service and callers."""
        own = resource.getrusage(resource.RUSAGE_SELF)
        return own.ru_utime + own.ru_stime + sum(_cpu_of_tree(child.pid) for child in self.children)

    def close(self) -> None:
        """Ends both."""
        for child in self.children:
            child.terminate()
        for child in self.children:
            child.wait(20)


def _cpu_of_tree(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    own = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return own + sum(_cpu_of_tree(int(child)) for child in children)


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


def main() -> None:
    """Carries out orders until standard input ends. Arguments: the database's URL, a folder, and Restate's server."""
    url, beside, server = sys.argv[1:]
    with tempfile.TemporaryDirectory(dir=beside) as folder:
        engine = Engine(server, url, folder)
        try:
            Peer(url, accounts=1000, transfer=engine.transfer, cpu_s=engine.cpu_s).serve()
        finally:
            engine.close()


if __name__ == "__main__":
    main()

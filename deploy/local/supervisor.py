"""Runs the processes of Foldline as children: starts, watches and stops them in order; tests kill and freeze them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.engines import child as process
from deploy.engines.child import NotStarted
from shared.rpc.probes import LIVENESS

# A child of ours gets its own settings and never the administrator's URLs.
KEPT_FROM_CHILDREN = ("DATABASE_URL", "NATS_URL", "FOLDLINE_")
BACKOFF_MAX_S = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A program: `python -m module` with these settings. `port` is its gRPC port, if it serves calls.

    `health_port` is where it answers gRPC health, `admin_port` where it answers /healthz, /readyz and /metrics over HTTP.
    Programs of a lower `wave` are stopped before those of a higher one.
    """

    name: str
    module: str
    settings: Mapping[str, str]
    port: int | None = None
    health_port: int = 0
    admin_port: int = 0
    wave: int = 0

    @property
    def address(self) -> str:
        """Where it serves; raises ValueError for a program that does not."""
        if self.port is None:
            raise ValueError(f"{self.name} serves nothing")
        return f"127.0.0.1:{self.port}"


class Supervisor:
    """Children by name. Use it from the main thread: a child is ended when the thread that started it ends."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self.programs: dict[str, Program] = {}
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._wanted: set[str] = set()
        self._started_at: dict[str, float] = {}

    def add(self, program: Program) -> None:
        """Adds a program without starting it."""
        self.programs[program.name] = program

    def log(self, name: str) -> Path:
        """The file with the program's output, of all its runs."""
        return self.logs / f"{name}.log"

    def pid(self, name: str) -> int:
        """The process id of the program as it runs; raises LookupError if it does not."""
        if not self.alive(name):
            raise LookupError(f"{name} does not run")
        return self._children[name].pid

    def alive(self, name: str) -> bool:
        """Whether the program runs (a stopped one, as by SIGSTOP, does)."""
        child = self._children.get(name)
        return child is not None and child.poll() is None

    def start(self, name: str) -> None:
        """Starts a program and does not wait until it is ready. Does nothing if it runs."""
        self._wanted.add(name)
        if self.alive(name):
            return
        program = self.programs[name]
        environment = {key: value for key, value in os.environ.items() if not key.startswith(KEPT_FROM_CHILDREN)}
        self._children[name] = process.spawn(
            [sys.executable, "-m", program.module], log=self.log(name), environment={**environment, **program.settings}
        )
        self._started_at[name] = time.monotonic()

    async def wait_ready(self, name: str, timeout_s: float = 30) -> None:
        """Waits until the program reports SERVING over gRPC health. Raises NotStarted.

        A program without a gRPC port is ready as soon as it answers that it lives; it waits by itself for what it needs.
        """
        deadline = process.Deadline(timeout_s)
        program = self.programs[name]
        while not await self._serving(program):
            if not self.alive(name) or deadline.passed:
                how = "runs but does not serve" if self.alive(name) else f"ended with {self._children[name].returncode}"
                raise NotStarted(f"{name} {how}, see {self.log(name)}:\n{process.tail(self.log(name))}")
            await asyncio.sleep(0.02)

    async def _serving(self, program: Program) -> bool:
        if not self.alive(program.name):
            return False
        port = program.port or program.health_port
        if not port:
            return True
        try:  # a plain connection first: at each start it is refused fifty times, and a channel costs 5 ms of a processor
            _, connection = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            return False
        connection.close()
        # A new channel each time: one that failed waits for longer and longer before it tries again.
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            service = LIVENESS if program.port is None else ""
            try:
                answer = await check(health_pb2.HealthCheckRequest(service=service), timeout=2)
            except grpc.aio.AioRpcError:
                return False
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def start_all(self, timeout_s: float = 30, *, ready: Callable[[str], None] = lambda _: None) -> None:
        """Starts every program at once and waits for each; calls `ready` as they come. Raises NotStarted."""
        for name in self.programs:
            self.start(name)

        async def wait(name: str) -> None:
            await self.wait_ready(name, timeout_s)
            ready(name)

        async with asyncio.TaskGroup() as waiting:
            for name in self.programs:
                waiting.create_task(wait(name))

    def send_signal(self, name: str, what: signal.Signals) -> None:
        """Sends a signal to a program that runs."""
        os.kill(self.pid(name), what)

    def sigstop(self, name: str) -> None:
        """Freezes a program: it keeps its connections and does nothing."""
        self.send_signal(name, signal.SIGSTOP)

    def sigcont(self, name: str) -> None:
        """Wakes a frozen program."""
        self.send_signal(name, signal.SIGCONT)

    async def kill9(self, name: str) -> None:
        """Kills a program with -9 and waits until it is gone. `keep_running` would start it again."""
        child = self._children[name]  # the next one may run before we have looked
        self.send_signal(name, signal.SIGKILL)
        await self._gone(child, 10)

    async def stop(self, name: str, timeout_s: float = 10) -> int:
        """Ends a program by SIGTERM, past the time-out by SIGKILL; returns its exit code. It stays down."""
        self._wanted.discard(name)
        child = self._children[name]
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
            child.send_signal(signal.SIGCONT)  # a frozen one would not hear it
            if not await self._gone(child, timeout_s):
                child.kill()
                await self._gone(child, 10)
        return child.wait()

    async def stop_all(self, timeout_s: float = 9.5) -> None:
        """Ends all programs, wave after wave, in at most `timeout_s` together."""
        end = time.monotonic() + timeout_s
        waves = sorted({program.wave for program in self.programs.values()})
        for later, wave in zip(range(len(waves) - 1, -1, -1), waves, strict=True):
            left = max(end - time.monotonic() - 1.5 * later, 0.5)
            names = [program.name for program in self.programs.values() if program.wave == wave]
            await asyncio.gather(*(self.stop(name, left) for name in names if name in self._children))

    async def keep_running(self, died: Callable[[str, int], None]) -> None:
        """Starts programs again that died, until cancelled; `died` is called with the name and the exit code.

        The first restart is at once; a program that dies again soon waits longer and longer, up to 4 s.
        """
        backoff: dict[str, float] = {}
        due: dict[str, float] = {}
        while True:
            await asyncio.sleep(0.05)
            now = time.monotonic()
            for name in sorted(self._wanted):
                if self.alive(name):
                    continue
                if name not in due:
                    died(name, self._children[name].returncode)
                    lasted = now - self._started_at[name]
                    backoff[name] = min(backoff.get(name, 0.25) * 2, BACKOFF_MAX_S) if lasted < 10 else 0.0
                    due[name] = now + backoff[name]
                if now >= due[name]:
                    del due[name]
                    self.start(name)

    async def _gone(self, child: subprocess.Popen[bytes], timeout_s: float) -> bool:
        """Whether the child ended within the time."""
        deadline = process.Deadline(timeout_s)
        while child.poll() is None:
            if deadline.passed:
                return False
            await asyncio.sleep(0.01)
        return True

"""Processes that the bench starts or watches: orders and answers as lines of JSON, processor time, memory.

Reads /proc, so it measures on Linux alone.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

Answer = dict[str, float]
"""What a child of ours measured: done, sent, per_s, p50_ms, cpu_us and the like."""

_PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 1024 / 1024


class Child:
    """A process of the bench, `python -m tests.bench.NAME`, that answers each line with a line."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid

    @classmethod
    async def start(cls, name: str, *arguments: str) -> Child:
        """Starts it; its standard error is ours."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            f"tests.bench.{name}",
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            # As Foldline's own: where a kernel shares its processors out by session, each has a share of its own.
            start_new_session=True,
        )
        return cls(process)

    async def ask(self, order: Any) -> Answer:
        """Sends an order and waits for the answer; raises RuntimeError if the process ends instead."""
        assert self._process.stdin is not None  # started with a pipe
        content = asdict(order) if is_dataclass(order) and not isinstance(order, type) else order
        self._process.stdin.write(json.dumps(content).encode() + b"\n")
        return await self.answer()

    async def answer(self) -> Answer:
        """The next line that it writes."""
        assert self._process.stdout is not None  # started with a pipe
        line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a process of the bench ended with {await self._process.wait()}")
        answer: Answer = json.loads(line)
        return answer

    async def stop(self) -> None:
        """Ends it, with the processes that it has started: it leads a session of its own."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        await self._process.wait()


def cpu_s(pid: int) -> float:
    """The processor time that the living threads of a process have used, to the nanosecond; 0 if it is gone."""
    total_ns = 0
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):
                total_ns += int((task / "schedstat").read_text().split()[0])
    return total_ns / 1e9


def children_of(pid: int) -> list[int]:
    """The processes that a process has started."""
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in found.read_text().split()] if found.exists() else []


def family_cpu_s(pid: int) -> float:
    """The processor time of a process and its children, also of those that have ended: of a postmaster, all of PostgreSQL."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ended_s = (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")
    return cpu_s(pid) + ended_s + sum(cpu_s(child) for child in children_of(pid))


def memory_mib(pid: int) -> float:
    """The memory of a process that is in use now (resident)."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_MIB


class Meter:
    """What processes cost between two moments."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._pids = pids
        self._before = {name: family_cpu_s(pid) for name, pid in pids.items()}

    def per_command_us(self, commands: float) -> dict[str, float]:
        """Microseconds of processor time a command, by process."""
        return {
            name: round(1e6 * (family_cpu_s(pid) - self._before[name]) / max(commands, 1), 1) for name, pid in self._pids.items()
        }

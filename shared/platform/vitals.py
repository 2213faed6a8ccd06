"""How the process itself fares: its event loop, memory, processor time, and what the garbage collector found."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import time

from shared.platform.instruments import SECONDS, Histogram
from shared.platform.metrics import Metrics

BEAT_S = 0.1
_PAGE = os.sysconf("SC_PAGESIZE")


class Vitals:
    """Measures the process; `beat` must run for the delay of the event loop to be known."""

    def __init__(self, metrics: Metrics) -> None:
        self._delay = Histogram(
            "foldline.event_loop.delay",
            "How much later than asked for the event loop got to a timer, ten times a second.",
            unit="s",
            bounds=SECONDS,
        )
        metrics.add(self._delay)
        began = time.time()
        metrics.gauge("process.memory.usage", "Resident memory.", lambda: [(resident_bytes(), {})], unit="By")
        metrics.gauge("process.start.time", "When it began, in seconds since 1970.", lambda: [(began, {})], unit="s")
        metrics.gauge("process.open_file_descriptors", "Open files and sockets.", lambda: [(_open_files(), {})])
        metrics.counter("process.cpu.time", "Processor time.", _cpu, unit="s")
        metrics.counter("process.gc.collections", "Runs of the garbage collector.", _collections)

    async def beat(self) -> None:
        """Measures the delay until cancelled."""
        clock = asyncio.get_running_loop().time
        while True:
            due = clock() + BEAT_S
            await asyncio.sleep(BEAT_S)
            self._delay.observe(max(clock() - due, 0.0))


def resident_bytes() -> int:
    """The process's resident memory now; where /proc is missing, the most that it ever was."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * _PAGE
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _open_files() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 0


def _cpu() -> list[tuple[float, dict[str, str]]]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return [(used.ru_utime, {"cpu.mode": "user"}), (used.ru_stime, {"cpu.mode": "system"})]


def _collections() -> list[tuple[float, dict[str, str]]]:
    return [(each["collections"], {"generation": str(nth)}) for nth, each in enumerate(gc.get_stats())]

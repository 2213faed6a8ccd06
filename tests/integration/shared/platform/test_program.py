"""How a process begins and ends."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import asyncio, sys
from shared.platform.program import run, stop_requested

async def main():
    stop = stop_requested()
    print(type(asyncio.get_running_loop()).__module__, flush=True)
    await stop.wait()
    print("stopped", flush=True)

run(main, fast_loop=sys.argv[1] == "fast")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("loop", "module"), [("fast", "uvloop"), ("standard", "asyncio.unix_events")])
def test_a_process_ends_by_itself_when_told(number: signal.Signals, loop: str, module: str) -> None:
    """Both signals are a request on both event loops, and the process ends with 0."""
    with subprocess.Popen([sys.executable, "-c", PROGRAM, loop], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == module
        process.send_signal(number)
        assert process.stdout.readline() == "stopped\n"
        assert process.wait(10) == 0

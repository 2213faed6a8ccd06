"""The thread of grpc.aio outlives every channel."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import asyncio, threading
from shared.rpc.client import channel

def pollers():
    return [thread.name for thread in threading.enumerate() if "_poll_wrapper" in thread.name]

async def use():
    async with channel("127.0.0.1:1"):
        pass

asyncio.run(use())
assert len(pollers()) == 1, pollers()
asyncio.run(use())
assert len(pollers()) == 1, pollers()
"""


def test_no_channel_waits_for_grpc_s_thread_when_it_is_freed() -> None:
    """Waiting has no limit, so the last channel of a process could hang it. It ends by itself with the process."""
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=60)  # noqa: S603 - a program of ours

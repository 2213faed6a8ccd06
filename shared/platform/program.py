"""How a process begins and how it is told to end."""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import Callable, Coroutine
from typing import Any

import uvloop


def run(main: Callable[[], Coroutine[Any, Any, None]], *, fast_loop: bool = True) -> None:
    """Runs `main` on the process's one event loop: uvloop, or asyncio's own if not `fast_loop`."""
    # What was imported lives as long as the process: the collector need not look at it again. Nor need it come after every
    # few hundred objects, when most die young and without it. But grpc.aio leaves a cycle behind at every call, with the
    # call's metadata in it: of 50,000 such objects it made pauses of 30 ms, and none were in the processor's caches.
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if fast_loop else None) as runner:
        runner.run(main())


def stop_requested() -> asyncio.Event:
    """An event that is set by SIGTERM and SIGINT, which then no longer end the process: whoever asks must end it."""
    event = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, event.set)
    return event

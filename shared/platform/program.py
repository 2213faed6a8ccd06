"""The event loop of a program, and the signals that end it."""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import Callable, Coroutine
from typing import Any

import uvloop


def run(main: Callable[[], Coroutine[Any, Any, None]], *, fast_loop: bool = True) -> None:
    """Runs `main` on the process's one event loop: uvloop, or asyncio's own if not `fast_loop`."""
    # Imported objects live as long as the process, so the collector need not visit them again. It also runs less often, since
    # most objects are freed without it. But grpc.aio leaves a reference cycle at every call, with the call's metadata: when
    # 50,000 such objects had gathered, collecting them took 30 ms. So it does not run much less often.
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if fast_loop else None) as runner:
        runner.run(main())


def stop_requested() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set. They do not end the process any more, so the caller must."""
    event = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, event.set)
    return event

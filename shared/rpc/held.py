"""Keeps the thread of grpc.aio for the life of the process."""

from __future__ import annotations

import functools

from grpc import aio


@functools.cache
def hold_grpc() -> None:
    """Call before the first channel or server of a process is made; further calls do nothing.

    grpc.aio ends its polling thread when the last of its objects is freed, and waits for that thread without a limit. Operations
    that are still under way keep it from ending, so a process could hang at its end, or whenever the collector runs (grpc's
    issue 22365). As long as one more user is counted than there are, the thread is never waited for.
    """
    aio.init_grpc_aio()

"""The traces of a command's calls."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from shared.platform import otel, tracing


@contextmanager
def recording() -> Iterator[None]:
    """Records each call in the block as a client span, if OpenTelemetry's variables ask for an export that Foldline has.

    A command waits for its collector as long as a process that ends, two seconds at most, and prints nothing of it.
    """
    if not otel.unsupported():
        logging.getLogger("opentelemetry").addHandler(logging.NullHandler())  # else complaints go to standard error
        tracing.configure("cli")
    try:
        yield
    finally:
        tracing.shutdown()

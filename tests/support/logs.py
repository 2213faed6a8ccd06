"""What is logged while a test looks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from shared.platform import telemetry


class _Kept:
    level = logging.DEBUG

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def take(self, note: telemetry.Note) -> None:
        self.lines.append({**note.event, "log_level": note.level})


@contextmanager
def capture_logs() -> Iterator[list[dict[str, Any]]]:
    """A list that everything is added to that is logged in the block, by whichever module; nothing of it is printed."""
    kept = _Kept()
    before = telemetry.divert(kept)
    try:
        yield kept.lines
    finally:
        telemetry.divert(before)

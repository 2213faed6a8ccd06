"""`python -m tests.bench.switched_write_service`: the write service, which turns its traces off and on while it serves.

What an unsampled call costs more is less than the difference between two processes of the same code, and between one second
and the next. So one process takes turns, a few calls each, and writes what each turn took to the file TURNS_FILE, a line of
JSON each. The spans go where OTEL_EXPORTER_OTLP_ENDPOINT says.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from types import FrameType
from typing import Any

from shared.platform import tracing
from shared.platform.spans import Recorder
from shared.rpc import server
from shared.rpc.behaviours import standard_behaviours
from write_service.__main__ import main as serve

CALLS_OF_A_TURN = 64
OFF, UNSAMPLED, SAMPLED = "off", "unsampled", "sampled"
"""Off as with OTEL_SDK_DISABLED; on, and the sampler is asked of each call and wants none; on, and each call is recorded."""
TAKE_TURNS, SAMPLE_ALL = signal.SIGUSR1, signal.SIGUSR2
"""What the signals ask for: OFF and UNSAMPLED in turns, as it is at first; SAMPLED in every turn."""


class Switch:
    """The first behaviour of every call: counts it, and ends the turn after as many as a turn has."""

    def __init__(self) -> None:
        self._recorders = {
            OFF: None,
            UNSAMPLED: _recorder("parentbased_traceidratio", "0"),
            SAMPLED: _recorder("always_on", ""),
        }
        self._file = open(os.environ["TURNS_FILE"], "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (as long as the process)
        self._ways = (OFF, UNSAMPLED)
        self._way = OFF
        self._turns = self._calls = 0
        self._began = time.process_time(), time.perf_counter()

    def ask(self, number: int, _: FrameType | None) -> None:
        """Changes the ways that the turns go from now on: a handler of the signals."""
        self._ways = (OFF, UNSAMPLED) if number == TAKE_TURNS else (SAMPLED, SAMPLED)
        self._calls = CALLS_OF_A_TURN

    def enter(self, call: Any) -> None:
        """A call begins."""
        self._calls += 1
        if self._calls < CALLS_OF_A_TURN:
            return
        now = time.process_time(), time.perf_counter()
        if self._calls == CALLS_OF_A_TURN:
            took_s = [after - before for before, after in zip(self._began, now, strict=True)]
            self._file.write(json.dumps({"way": self._way, "cpu_s": took_s[0], "wall_s": took_s[1]}) + "\n")
        self._turns += 1
        self._way = self._ways[self._turns % 2]
        tracing._recorder = self._recorders[self._way]
        self._calls, self._began = 0, (time.process_time(), time.perf_counter())


def main() -> int:
    """Serves; returns the exit code."""
    switch = Switch()
    os.environ["OTEL_SDK_DISABLED"] = "true"  # the service makes no recorder of its own
    setattr(server, "standard_behaviours", lambda *given: (switch, *standard_behaviours(*given)))  # noqa: B010 (it is imported there)
    for number in (TAKE_TURNS, SAMPLE_ALL):
        signal.signal(number, switch.ask)
    return serve()


def _recorder(sampler: str, argument: str) -> Recorder:
    os.environ |= {"OTEL_TRACES_SAMPLER": sampler, "OTEL_TRACES_SAMPLER_ARG": argument}
    return Recorder("write_service")


if __name__ == "__main__":
    sys.exit(main())

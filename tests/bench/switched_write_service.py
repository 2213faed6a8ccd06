"""`python -m tests.bench.switched_write_service`: the write service, whose traces a signal turns off, on or on for all calls.

Two processes of the same code differ by more than what telemetry may cost, for as long as they live, so `telemetry.py`
compares one process with itself. The spans go where OTEL_EXPORTER_OTLP_ENDPOINT says.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from shared.platform import tracing
from shared.platform.spans import Recorder
from write_service.__main__ import main as serve

OFF, UNSAMPLED, SAMPLED = signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP
"""Off as with OTEL_SDK_DISABLED; on, and the sampler is asked of every call and wants none; on, and every call is recorded."""


def main() -> int:
    """Serves with traces off, until the first of the signals; returns the exit code."""
    recorders = {
        OFF: None,
        UNSAMPLED: _recorder("parentbased_traceidratio", "0"),
        SAMPLED: _recorder("parentbased_always_on", ""),
    }
    os.environ["OTEL_SDK_DISABLED"] = "true"  # the service makes no recorder of its own

    def switch(number: int, _: FrameType | None) -> None:
        tracing._recorder = recorders[signal.Signals(number)]

    for each in recorders:
        signal.signal(each, switch)
    return serve()


def _recorder(sampler: str, argument: str) -> Recorder:
    os.environ |= {"OTEL_TRACES_SAMPLER": sampler, "OTEL_TRACES_SAMPLER_ARG": argument}
    return Recorder("write_service")


if __name__ == "__main__":
    sys.exit(main())

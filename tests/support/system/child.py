"""A program for tests of the supervisor: prints that it runs, and ends on SIGTERM with 7. With STUBBORN it ignores SIGTERM."""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Waits for signals."""
    # Blocked until it is waited for: a handler could run in the moment before the wait begins, which then had no end.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    print("running", os.environ.get("DATABASE_URL"), os.environ.get("GREETING"), flush=True)  # noqa: T201 (read from its log)
    while signal.sigwait({signal.SIGTERM}) and os.environ.get("STUBBORN"):
        pass
    sys.exit(7)


if __name__ == "__main__":
    main()

"""A program for tests of the supervisor: prints that it runs, and ends on SIGTERM with 7. With STUBBORN it ignores SIGTERM."""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Waits for signals."""
    if os.environ.get("STUBBORN"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
    print("running", os.environ.get("DATABASE_URL"), os.environ.get("GREETING"), flush=True)  # noqa: T201 (read from its log)
    while True:
        signal.pause()


if __name__ == "__main__":
    main()

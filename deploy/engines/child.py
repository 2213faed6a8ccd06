"""Child processes, their ports, and waiting for them."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

LAUNCH = Path(__file__).with_name("launch.py")


class NotStarted(RuntimeError):
    """A child did not become ready; the text ends with the last lines of its log."""


PORTS = range(15000, 32000)
"""Below the range for outgoing connections, so that a server can be stopped and started again on the same port."""
BLOCK = 50


def free_port() -> int:
    """A free port of 127.0.0.1, which nobody was given before: the server that it is for may not listen yet.

    Ports come in blocks, each of one process alone as long as it runs: it keeps the first port of the block bound. So
    several processes may start systems at once. Raises NotStarted if all blocks are taken.
    """
    port = next(_mine, None)
    if port is None:
        raise NotStarted(f"found no free port between {PORTS.start} and {PORTS.stop}")
    return port


def _free_ports() -> Iterator[int]:
    for start in random.sample(PORTS[::BLOCK], len(PORTS[::BLOCK])):
        holder = socket.socket()
        try:
            holder.bind(("127.0.0.1", start))
        except OSError:
            holder.close()
            continue
        holder.detach()  # stays bound as long as the process runs
        yield from filter(is_free, range(start + 1, start + BLOCK))


_mine = _free_ports()


def is_free(port: int) -> bool:
    """Whether a server could listen on that port of 127.0.0.1 now. Port 0 is none."""
    with socket.socket() as probe:
        # As servers do: connections of a former server that are not forgotten yet do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return port != 0


def command(
    program: Sequence[str | Path], *, on_parent_death: signal.Signals = signal.SIGTERM, identity: str = "same"
) -> list[str]:
    """The command line that runs `program` through launch.py."""
    head = [sys.executable, "-I", "-S", str(LAUNCH), str(os.getpid()), str(int(on_parent_death)), identity]
    return head + [str(part) for part in program]


def spawn(
    program: Sequence[str | Path],
    *,
    log: Path,
    on_parent_death: signal.Signals = signal.SIGTERM,
    identity: str = "same",
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Starts `program` with its output appended to `log`.

    The child has a session of its own, so that Ctrl-C reaches only this process, which then stops children in order. Call it
    from the main thread: the kernel ends the child when the *thread* that started it ends.
    """
    log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with log.open("ab") as output:
        return subprocess.Popen(
            command(program, on_parent_death=on_parent_death, identity=identity),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd="/",
            env=None if environment is None else dict(environment),
            start_new_session=True,
        )


def end(process: subprocess.Popen[bytes] | None, how: signal.Signals, timeout_s: float) -> None:
    """Sends a signal and waits; past the time-out it kills. Does nothing to a process that has ended."""
    if process is None or process.poll() is not None:
        return
    process.send_signal(how)
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def tail(log: Path, size: int = 2000) -> str:
    """The last characters of a log."""
    return log.read_text(errors="replace")[-size:] if log.exists() else ""


class Deadline:
    """A moment after which waiting stops."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def passed(self) -> bool:
        """Whether the moment is over."""
        return time.monotonic() > self._end

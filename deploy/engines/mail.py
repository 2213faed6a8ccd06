"""A mail server for development: it takes every message and keeps it in a folder. It forwards nothing."""

from __future__ import annotations

import mailbox
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from deploy.engines import child as process
from deploy.engines.child import Deadline, NotStarted


class MailSink:
    """An SMTP server on 127.0.0.1, whose messages are kept as a Maildir."""

    def __init__(self, folder: Path, *, port: int) -> None:
        self.folder = folder.absolute()
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The URL for FOLDLINE_SMTP_URL: plain, since it never leaves this machine."""
        return f"smtp://127.0.0.1:{self._port}?starttls=off"

    @property
    def running(self) -> bool:
        """Whether our child lives."""
        return self._process is not None and self._process.poll() is None

    def start(self, timeout_s: float = 30) -> str:
        """Starts the server, waits until it listens; returns the URL. Raises NotStarted."""
        deadline = Deadline(timeout_s)
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        mailbox.Maildir(self.folder / "messages", create=True).close()
        handler = ["-c", "aiosmtpd.handlers.Mailbox", str(self.folder / "messages")]
        program = [sys.executable, "-m", "aiosmtpd", "--nosetuid", "--listen", f"127.0.0.1:{self._port}", *handler]
        log = self.folder / "mail.log"
        self._process = process.spawn(program, log=log)
        while self.running and not deadline.passed:
            try:
                socket.create_connection(("127.0.0.1", self._port), timeout=1).close()
            except OSError:
                time.sleep(0.02)
            else:
                return self.url
        raise NotStarted(f"the mail server did not start, see {log}:\n{process.tail(log)}")

    def stop(self, timeout_s: float = 5) -> None:
        """Stops it; what arrived is kept."""
        process.end(self._process, signal.SIGTERM, timeout_s)

    def destroy(self) -> None:
        """Stops it and deletes what arrived."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

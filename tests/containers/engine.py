"""Podman, driven from outside: each call is a program with a time limit, and a failure shows what it said."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COMMAND_S = 120.0
NOFILE_MAX = 4096
NPROC_MAX = 4096


class Failed(Exception):
    """A program ended with another code than 0, or not in time."""


class NoEngine(Exception):
    """A program that is needed is not installed, or starts no container."""


def run(
    program: Sequence[str | Path],
    *,
    environment: Mapping[str, str] | None = None,
    within_s: float = COMMAND_S,
    cwd: Path | None = None,
    with_stderr: bool = False,
) -> str:
    """What the program prints on stdout, or on both streams. Raises Failed."""
    line = [str(part) for part in program]
    try:
        done = subprocess.run(
            line,
            env={**os.environ, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if with_stderr else subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=within_s,
            cwd=cwd,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise Failed(f"{' '.join(line)}: not within {within_s:.0f} s") from error
    if done.returncode:
        raise Failed(f"{' '.join(line)}: code {done.returncode}\n{done.stdout[-4000:]}\n{(done.stderr or '')[-4000:]}")
    return done.stdout


class Podman:
    """The engine. Containers get limits no higher than this process may give, so it works with few privileges too."""

    def __init__(self, folder: Path) -> None:
        """`folder` is for the engine's settings. Raises NoEngine."""
        if shutil.which("podman") is None:
            raise NoEngine("`podman` is not installed")
        self.environment = {"PODMAN_IGNORE_CGROUPSV1_WARNING": "1"}
        if "CONTAINERS_CONF" not in os.environ:
            settings = folder / "containers.conf"
            settings.write_text(_settings())
            self.environment["CONTAINERS_CONF"] = str(settings)
        try:
            self("info")
        except Failed as error:
            raise NoEngine(f"`podman info` fails: {error}") from error

    def __call__(self, *arguments: str | Path, within_s: float = COMMAND_S) -> str:
        """What `podman ARGUMENTS` prints. Raises Failed."""
        return run(["podman", *arguments], environment=self.environment, within_s=within_s).strip()

    def knows(self, image: str) -> bool:
        """Whether the image is here."""
        try:
            self("image", "exists", image)
        except Failed:
            return False
        return True

    def inspect(self, name: str) -> dict[str, Any]:
        """Everything about a container or an image."""
        found: list[dict[str, Any]] = json.loads(self("inspect", name))
        return found[0]

    def pid(self, container: str) -> int:
        """The process of a container as this machine sees it; 0 if it does not run."""
        return int(self.inspect(container)["State"]["Pid"])

    def kill9(self, container: str) -> int:
        """Kills a container's process as the kernel would for want of memory: the engine is not told. Returns its pid.

        Raises Failed if it does not run: to the kernel 0 is every process of the caller's own group.
        """
        pid = self.pid(container)
        if not pid:
            raise Failed(f"{container} does not run:\n{self.logs(container)}")
        os.kill(pid, signal.SIGKILL)
        return pid

    def logs(self, container: str, lines: int = 40) -> str:
        """The last lines that a container wrote, both streams."""
        program = ["podman", "logs", "--tail", str(lines), container]
        return run(program, environment=self.environment, with_stderr=True)


def program(name: str) -> Path:
    """A program of the environment that the tests run in."""
    found = Path(sys.executable).with_name(name)
    if not found.exists():
        raise NoEngine(f"`{name}` is not in the environment of the tests; `make test-containers` installs it")
    return found


def _settings() -> str:
    """Podman's usual limits are higher than an unprivileged root may set."""
    files = min(NOFILE_MAX, _hard(resource.RLIMIT_NOFILE))
    processes = min(NPROC_MAX, _hard(resource.RLIMIT_NPROC))
    systemd = Path("/run/systemd/system").is_dir()
    lines = [
        "[containers]",
        f'default_ulimits = ["nofile={files}:{files}", "nproc={processes}:{processes}"]',
        "[engine]",
        f'cgroup_manager = "{"systemd" if systemd else "cgroupfs"}"',
        'events_logger = "file"',
    ]
    if shutil.which("runc"):
        lines.append('runtime = "runc"')
    return "\n".join(lines) + "\n"


def _hard(kind: int) -> int:
    hard = resource.getrlimit(kind)[1]
    return sys.maxsize if hard == resource.RLIM_INFINITY else hard

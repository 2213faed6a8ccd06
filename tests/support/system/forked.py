"""Processes forked from one that has all imports: each is there in 20 ms, where a start of Python takes half a second or more."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import pkgutil
import runpy
import subprocess
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cli

# A worker has one process to fork from, so this is what is imported for all who fork.
IMPORTED = (
    "tests.support.system.halting",
    "tests.support.system.purging",
    "tests.support.system.rebuilding_killed",
    "tests.support.system.sweeping",
    "read_service.app",
    "shared.projections.groups",
    "write_service.app",
    "shared.line.relay",
    *(f"cli.{module.name}" for module in pkgutil.iter_modules(cli.__path__) if module.name != "main"),
    "bank.v1.account_pb2_grpc",
    "foldline.v1.command_pb2_grpc",
)
STREAMS = ("typed", "printed", "complained")


def context() -> ForkServerContext:
    """Starts processes that have the imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    return context


def start(main: Callable[..., Coroutine[Any, Any, None]], *words: str) -> BaseProcess:
    """A process that runs `main(*words)` on an event loop and ends with 0."""
    process = context().Process(target=_on_a_loop, args=(main, words), daemon=True)
    process.start()
    return process


async def ended(process: BaseProcess, timeout_s: float = 60) -> int:
    """Waits for the end of a process; returns its exit code, -9 for SIGKILL. Raises TimeoutError."""
    await asyncio.to_thread(process.join, timeout_s)
    if process.exitcode is None:
        raise TimeoutError(f"it has not ended within {timeout_s} s")
    return process.exitcode


def run(
    module: str, words: Sequence[str], *, cwd: Path, env: Mapping[str, str], typed: str = "", timeout_s: float = 60
) -> subprocess.CompletedProcess[str]:
    """What `python -m module words` does and prints, given what is typed. Raises subprocess.TimeoutExpired."""
    with TemporaryDirectory(dir=cwd.parent) as folder:
        program = Program(module, words, cwd=cwd, env=env, folder=Path(folder), typed=typed)
        try:
            code = program.wait(timeout_s)
        finally:
            program.kill()
        return subprocess.CompletedProcess([module, *words], code, program.printed, program.complained)


class Program:
    """A running `python -m module words`. What it prints is in files of a folder of its own."""

    def __init__(
        self, module: str, words: Sequence[str] = (), *, cwd: Path, env: Mapping[str, str], folder: Path, typed: str = ""
    ) -> None:
        self._what = [module, *words]
        self._files = [folder / name for name in STREAMS]
        self._files[0].write_text(typed)
        arguments = (module, list(words), cwd, dict(env), self._files)
        self._process = context().Process(target=_become, args=arguments, daemon=True)
        self._process.start()

    @property
    def printed(self) -> str:
        """What it has written to standard output."""
        return self._files[1].read_text() if self._files[1].exists() else ""

    @property
    def complained(self) -> str:
        """What it has written to standard error."""
        return self._files[2].read_text() if self._files[2].exists() else ""

    def terminate(self) -> None:
        """Sends SIGTERM."""
        self._process.terminate()

    def wait(self, timeout_s: float) -> int:
        """Its exit code, when it has ended; -15 for SIGTERM. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout_s)
        if (code := self._process.exitcode) is None:
            raise subprocess.TimeoutExpired(self._what, timeout_s)
        return code

    def kill(self) -> None:
        """Ends it, if it has not ended."""
        self._process.kill()
        self._process.join()


def _on_a_loop(main: Callable[..., Coroutine[Any, Any, None]], words: tuple[str, ...]) -> None:
    asyncio.run(main(*words))


def _become(module: str, words: list[str], cwd: Path, env: dict[str, str], files: list[Path]) -> None:
    """Runs in the forked process."""
    for number, file in enumerate(files):
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin, sys.stdout, sys.stderr = open(0, closefd=False), open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv[1:] = words
    runpy.run_module(module, run_name="__main__", alter_sys=True)

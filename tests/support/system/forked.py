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
        files = [Path(folder, name) for name in STREAMS]
        files[0].write_text(typed)
        process = context().Process(target=_become, args=(module, list(words), cwd, dict(env), files), daemon=True)
        process.start()
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired([module, *words], timeout_s)
        printed, complained = (file.read_text() for file in files[1:])
        code = process.exitcode
        process.close()
    return subprocess.CompletedProcess([module, *words], code, printed, complained)


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

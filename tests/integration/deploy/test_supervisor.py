"""Children: their life, their death, and what they are not told."""

from __future__ import annotations

import asyncio
import io
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from rich.console import Console

from deploy.engines.child import NotStarted, free_port
from deploy.local.dev import show
from deploy.local.supervisor import Program, Supervisor
from tests.support.system.waiting import eventually

CHILD = "tests.support.system.child"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
async def supervisor(tmp_path: Path) -> AsyncIterator[Supervisor]:
    """A supervisor of one obedient and one stubborn child, not started."""
    supervisor = Supervisor(tmp_path)
    path = {"PYTHONPATH": str(ROOT)}
    supervisor.add(Program(name="meek", module=CHILD, settings={**path, "GREETING": "hello"}))
    supervisor.add(Program(name="stubborn", module=CHILD, wave=1, settings={**path, "STUBBORN": "1"}))
    yield supervisor
    await supervisor.stop_all(2)


async def started(supervisor: Supervisor, name: str) -> int:
    """Starts a child and waits for its first words; returns its pid."""
    supervisor.start(name)
    await eventually(lambda: "running" in supervisor.log(name).read_text())
    return supervisor.pid(name)


async def test_a_child_gets_its_settings_and_not_the_administrators(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DATABASE_URL is the administrator's: no service ever sees it."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://admin")
    await started(supervisor, "meek")
    assert supervisor.log("meek").read_text() == "running None hello\n"


async def test_stop_asks_first_and_kills_who_does_not_listen(supervisor: Supervisor) -> None:
    """SIGTERM ends the obedient with its own code; past the time-out the stubborn is killed."""
    await started(supervisor, "meek")
    await started(supervisor, "stubborn")
    assert await supervisor.stop("meek") == 7
    assert await supervisor.stop("stubborn", 0.2) == -9
    assert not supervisor.alive("stubborn")


async def test_all_are_stopped_within_the_time(supervisor: Supervisor) -> None:
    """Whatever the children do, the whole ends when it was promised to."""
    await started(supervisor, "meek")
    await started(supervisor, "stubborn")
    before = time.monotonic()
    await supervisor.stop_all(1)
    assert time.monotonic() - before < 15
    assert not supervisor.alive("meek")
    assert not supervisor.alive("stubborn")


async def test_a_frozen_child_can_be_stopped(supervisor: Supervisor) -> None:
    """SIGSTOP keeps it alive and silent; a stop still ends it."""
    await started(supervisor, "meek")
    supervisor.sigstop("meek")
    assert supervisor.alive("meek")
    assert await supervisor.stop("meek", 2) == 7


async def test_a_child_that_dies_is_started_again_unless_it_was_stopped(supervisor: Supervisor) -> None:
    """`foldline dev` heals what is killed, and leaves what was stopped."""
    first = await started(supervisor, "meek")
    deaths: list[tuple[str, int]] = []
    watching = asyncio.create_task(supervisor.keep_running(lambda name, code: deaths.append((name, code))))
    try:
        await supervisor.kill9("meek")
        await eventually(lambda: supervisor.alive("meek") and supervisor.pid("meek") != first)
        assert deaths == [("meek", -9)]
        await eventually(lambda: supervisor.log("meek").read_text().count("running") == 2)
        assert await supervisor.stop("meek") == 7
        await asyncio.sleep(0.2)  # several rounds of the watcher, which must do nothing
        assert not supervisor.alive("meek")
    finally:
        watching.cancel()


async def test_who_kills_does_not_wait_for_the_next_one_of_that_name(supervisor: Supervisor) -> None:
    """It may be running before the killer has looked."""
    first = await started(supervisor, "meek")

    async def start_again() -> None:
        while supervisor.alive("meek"):  # noqa: ASYNC110 - sooner than anybody else who looks now and then
            await asyncio.sleep(0)
        supervisor.start("meek")

    async with asyncio.timeout(8):  # it would be 10 s until the killer gives up on a child that lives
        await asyncio.gather(supervisor.kill9("meek"), start_again())
    assert supervisor.pid("meek") != first


async def test_a_child_that_ends_at_once_is_reported_with_its_log(supervisor: Supervisor) -> None:
    """What it said last is the first thing that whoever started it wants to know."""
    supervisor.add(Program(name="missing", module="no.such.module", settings={}, port=free_port()))
    supervisor.start("missing")
    with pytest.raises(NotStarted, match=r"missing ended with 1(.|\n)*No module named 'no'"):
        await supervisor.wait_ready("missing", 5)


async def test_who_serves_no_calls_is_ready_when_it_answers_that_it_lives(supervisor: Supervisor) -> None:
    """A program that runs and will soon fail, as one whose port is taken, is not said to be up."""
    supervisor.add(Program(name="deaf", module=CHILD, settings={"PYTHONPATH": str(ROOT)}, health_port=free_port()))
    await started(supervisor, "deaf")
    with pytest.raises(NotStarted, match=r"deaf runs but does not serve, see"):
        await supervisor.wait_ready("deaf", 0.2)


async def test_a_child_that_ended_is_shown_as_such(supervisor: Supervisor, tmp_path: Path) -> None:
    """`foldline dev` lists it, and starts it again right afterwards."""
    pid = await started(supervisor, "meek")
    await started(supervisor, "stubborn")
    await supervisor.kill9("stubborn")
    printed = io.StringIO()
    show(Console(file=printed, width=200), supervisor, tmp_path / "endpoints.json", tmp_path)
    assert [line.split()[1:6:4] for line in printed.getvalue().splitlines() if "meek" in line or "stubborn" in line] == [
        ["meek", str(pid)],
        ["stubborn", "ended"],
    ]


async def test_children_die_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    """After kill -9 of `foldline dev` nothing of it is left."""
    script = (
        "import pathlib, sys, time\n"
        "from deploy.local.supervisor import Program, Supervisor\n"
        f"s = Supervisor(pathlib.Path({str(tmp_path)!r}))\n"
        f"s.add(Program(name='child', module={CHILD!r}, settings={{'PYTHONPATH': {str(ROOT)!r}}}))\n"
        "s.start('child'); print(s.pid('child'), flush=True); time.sleep(60)\n"
    )
    path = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "protos")])}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=path) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        await eventually(lambda: "running" in (tmp_path / "child.log").read_text())
        parent.kill()
    await eventually(lambda: not Path(f"/proc/{child}").exists())

"""`foldline demo`: plays scenarios over gRPC on its own system, kills services under load, and prints what it found."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc.aio
import psycopg
from rich.console import Console
from rich.table import Table

from deploy.bank import Bank, NotEnded
from deploy.demo.kills import Kills
from deploy.demo.scenarios import Scenarios, Stage, Wrong
from deploy.engines.child import NotStarted
from deploy.local.dev import Machine
from deploy.local.system import READ, WRITE
from shared.platform.identity import Role


def run(out: Path = Path("out/demo.json"), *, console: Console | None = None) -> int:
    """Plays everything on a system in a temporary folder; returns 0 if all passed. Writes the outcome to `out`.

    `DATABASE_URL` and `NATS_URL` are used if set, as by `foldline dev`.
    """
    console = console or Console()
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # it would tell the terminal that a peer went away, as we made it
    out.parent.mkdir(parents=True, exist_ok=True)
    outcome = asyncio.run(_run(console, out.parent / "demo-logs"))
    out.write_text(json.dumps(outcome, indent=2) + "\n")
    console.print(f"Written to {out}.", highlight=False)
    return 0 if outcome["passed"] else 1


async def _run(console: Console, kept_logs: Path) -> dict[str, object]:
    began = time.monotonic()

    def say(text: str) -> None:
        console.print(f"[dim]{time.monotonic() - began:6.2f}[/] ", end="")
        console.print(text, markup=False, highlight=False)

    scenarios: dict[str, dict[str, object]] = {}
    complete = passed = False
    with tempfile.TemporaryDirectory(prefix="foldline-demo-", ignore_cleanup_errors=True) as folder:
        machine = Machine(Path(folder) / "data", prefix=f"foldline_demo_{secrets.token_hex(4)}", say=say)
        watching: asyncio.Task[None] | None = None
        try:
            system = await machine.start()
            watching = asyncio.create_task(machine.keep_running())
            async with system.channel(WRITE) as write, system.channel(READ) as read:
                bank = Bank(write, read, system.token("acme", "alice"))
                auditor = Bank(write, read, system.token("operators", "olga", [Role.READER]))
                neighbour = Bank(write, read, system.token("umbrella", "ada"))
                stage = Stage(say)
                calm = Scenarios(stage, bank, neighbour, machine.mail)
                kills = Kills(stage, system, machine.nats_url, bank, auditor)
                for key, scenario in {
                    "A": calm.rename,
                    "B": calm.snapshots,
                    "C": calm.boxes,
                    "money": calm.money,
                    "D": calm.logins,
                    "E": calm.later,
                    "F": calm.transfer,
                    "G": calm.mail,
                    "H": calm.overrides,
                    "I": calm.refund,
                    "J": calm.refusals,
                    "kill": kills.kill_write,
                    "kill_saga": kills.kill_saga,
                }.items():
                    scenarios[key] = await _play(key, scenario, say)
                complete = True
        except* (NotStarted, psycopg.OperationalError) as group:
            for error in group.exceptions:
                say(f"it did not start: {error}")
        finally:
            if watching is not None:
                watching.cancel()
                await asyncio.wait({watching})
            say("stop everything")
            await machine.stop()
            shutil.rmtree(kept_logs, ignore_errors=True)
            passed = complete and all(scenario["passed"] for scenario in scenarios.values())
            if not passed and machine.system is not None:
                shutil.copytree(machine.system.logs, kept_logs)
                say(f"what the processes said is in {kept_logs}")
            machine.destroy()
    _show(console, scenarios, time.monotonic() - began)
    return {"scenarios": scenarios, "passed": passed}


async def _play(key: str, scenario: Callable[[], Awaitable[None]], say: Callable[[str], None]) -> dict[str, object]:
    """Plays one scenario. If it fails, prints why; the other scenarios are played all the same."""
    began = time.monotonic()
    say(f"— {key}: {(scenario.__doc__ or '').splitlines()[0]}")
    try:
        await scenario()
        passed = True
    except* (Wrong, NotEnded, grpc.aio.AioRpcError) as group:
        passed = False
        for error in group.exceptions:
            text = f"{error.code().name}: {error.details()}" if isinstance(error, grpc.aio.AioRpcError) else str(error)
            say(f"  ✗ {text}")
    return {"passed": passed, "seconds": round(time.monotonic() - began, 2)}


def _show(console: Console, scenarios: dict[str, dict[str, object]], seconds: float) -> None:
    """The final table."""
    table = Table(title=f"Foldline demo, {seconds:.1f} s in all", title_justify="left")
    table.add_column("scenario")
    table.add_column("")
    table.add_column("seconds", justify="right")
    for key, scenario in scenarios.items():
        table.add_row(key, "[green]passed[/]" if scenario["passed"] else "[red]FAILED[/]", f"{scenario['seconds']:.2f}")
    console.print(table)

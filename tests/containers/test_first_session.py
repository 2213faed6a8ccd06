"""README's first session on the containers of compose.yaml: no line differs, and each does what README says of it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from deploy.bank import Bank
from shared.rpc.client import channel
from tests.containers.composed import Composed
from tests.containers.engine import Failed, run
from tests.containers.images import ROOT
from tests.containers.session import Session, first_session, grpc_call, on_containers
from tests.support.system.waiting import eventually

pytestmark = [pytest.mark.containers, pytest.mark.timeout(1200)]
LARGE_MINOR = 1_800_000
LINE_S = 120.0
TRIES = 3
MAIL_S = 120.0


class Shell:
    """A shell in an empty folder, as far as its user sees: with `deploy/compose.yaml` beside, and README's alias."""

    def __init__(self, folder: Path, environment: Mapping[str, str], composed: Composed) -> None:
        _, alias = on_containers()
        self.folder, self._alias, self._composed = folder, alias, composed
        self._environment = {**environment, "PWD": str(folder)}

    def __call__(self, line: str) -> str:
        """What a line prints, on both streams. Raises Failed if its code is not 0.

        Code 3, nothing answers, says to try again, and so it is done: Podman's name server forgets all names for a moment
        when a container comes or goes.
        """
        for left in reversed(range(TRIES)):
            try:
                return run(self._program(line), environment=self._environment, cwd=self.folder, within_s=LINE_S, with_stderr=True)
            except Failed as failed:
                if not left or "code 3\n" not in str(failed):
                    raise
        raise AssertionError

    def until_interrupted(self, line: str) -> str:
        """The first line that is printed; then Ctrl-C, with which the command ends well."""
        process = subprocess.Popen(
            self._program(line), env={**os.environ, **self._environment}, cwd=self.folder, stdout=subprocess.PIPE, text=True
        )
        with process:
            assert process.stdout is not None
            first = process.stdout.readline()
            self._composed.interrupt("foldline")
            process.stdout.read()
        assert process.returncode in {0, 130}
        return first

    def _program(self, line: str) -> list[str]:
        return ["bash", "-c", f"shopt -s expand_aliases\n{self._alias}\n{line}"]


async def test_the_first_session(composed: Composed, tmp_path: Path) -> None:
    """Every line succeeds, or is refused as its remark says, and files land in the caller's folder."""
    await composed.ready()
    tools, folder = tmp_path / "tools", tmp_path / "folder"
    tools.mkdir()
    folder.mkdir()
    (folder / "deploy").symlink_to(ROOT / "deploy")
    transfer = await _large_transfer(composed)
    await asyncio.to_thread(_play, Shell(folder, composed.docker(tools), composed))
    exported = json.loads((folder / "acme/manifest.json").read_text())
    assert exported["tenant"] == "acme"

    async def told() -> bool:
        return transfer in await asyncio.to_thread(composed.cli, "mail")

    await eventually(told, MAIL_S, every_s=1)


async def _large_transfer(composed: Composed) -> str:
    """The id of a transfer of Umbrella's of which its owner is told by e-mail."""
    async with (
        channel(f"127.0.0.1:{composed.ports['write']}", retries=False) as write,
        channel(f"127.0.0.1:{composed.ports['read']}", retries=False) as read,
    ):
        bank = Bank(write, read, composed.tokens()["umbrella"])
        owner, _ = await bank.register("Ada")
        (source, _), (target, _) = await bank.open(owner), await bank.open(owner)
        await bank.deposit(source, LARGE_MINOR)
        return (await bank.ended_transfer(await bank.transfer(source, target, LARGE_MINOR))).transfer_id


def _play(shell: Shell) -> None:
    session = Session(shell)
    printed: dict[str, str] = {}
    for line in first_session():
        if line.command.startswith("foldline watch"):
            watching = Session(shell.until_interrupted)
            watching.known = session.known
            assert "ACCOUNT_STATUS_ACTIVE" in watching.play(line)
        elif refusal := line.remark.partition("refused: ")[2]:
            with pytest.raises(Failed, match=rf"code 1\n.*refused: {refusal}"):
                session.play(line)
        else:
            printed[line.command] = session.play(line)
    assert printed["foldline status"].count("SERVING") == 3
    assert "Alice Cooper" in printed["foldline get person ID --after TOKEN"]
    assert "COMPLETED" in printed["foldline get transfer TRANSFER"]
    assert "whole: " in shell("foldline tenant verify ./acme")
    first, second = (shell(grpc_call()) for _ in range(2))
    assert first == second
    assert '"status": "COMMAND_STATUS_COMPLETED"' in first

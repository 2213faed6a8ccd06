"""README's first session, as its reader types it: line by line in a shell, with ids and tokens from the lines before."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from tests.containers.images import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS: list[str] = re.findall(r"^```\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
ACTIVATION = ". .venv/bin/activate"


@dataclass(frozen=True, slots=True)
class Line:
    """A command with its placeholders, and what README says of it."""

    command: str
    remark: str


def _the_block(what: str) -> str:
    """The one block of README that has the text in it."""
    [found] = [block for block in BLOCKS if what in block]
    return found


def first_session() -> list[Line]:
    """Its lines behind the activation of the environment."""
    activation, *lines = _the_block("foldline send RegisterPerson").splitlines()
    assert activation == ACTIVATION
    return [Line(command.strip(), remark.strip()) for command, _, remark in (line.partition("  # ") for line in lines)]


def grpc_call() -> str:
    """The call with another client than ours."""
    return _the_block("buf curl")


def on_containers() -> tuple[str, str]:
    """What stands in place of `make dev` and of the activation: what brings the containers up, and the alias."""
    up, alias = _the_block("alias foldline=").splitlines()
    return up, alias


class Session:
    """Plays lines. Each answer's id or token stands for its placeholder from then on."""

    def __init__(self, run: Callable[[str], str]) -> None:
        """`run` carries out a line of shell and returns what it prints."""
        self._run = run
        self.known: dict[str, str] = {}

    def play(self, line: Line) -> str:
        """Carries the line out and returns what it prints."""
        command = re.sub(r"\b(ID|TOKEN|ACCOUNT|OTHER|TRANSFER)\b", lambda name: self.known[name[0]], line.command)
        printed = self._run(command)
        match re.match(r"foldline send (\w+) ", command):
            case None:
                pass
            case sent:
                self._learn(sent[1], printed)
        return printed

    def _learn(self, command: str, printed: str) -> None:
        names = {"RegisterPerson": "ID", "OpenAccount": "ACCOUNT", "StartTransfer": "TRANSFER"}
        if command in names and (accepted := re.search(r"^accepted: \w+ (\S+) is at version", printed, re.MULTILINE)):
            name = "OTHER" if command == "OpenAccount" and "ACCOUNT" in self.known else names[command]
            self.known[name] = accepted[1]
        if command == "RenamePerson":
            [self.known["TOKEN"]] = re.findall(r"^  consistency token  (\S+)$", printed, re.MULTILINE)

"""The example subscribers of other teams, in each language, as processes; what they keep; and a defect of their handlers."""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
import subprocess
import sys
from abc import ABC, abstractmethod
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from examples.subscriber.inbox import Inbox, Place

ROOT = Path(__file__).parents[3]
NODE, NPM = shutil.which("node"), shutil.which("npm")
BROKEN = "EUR"
"""The currency whose deposits a broken handler cannot take."""
ENDS_WITHIN_S = 60.0

PYTHON_AND_NODE = [
    "python",
    pytest.param(
        "node",
        marks=[
            pytest.mark.long,
            pytest.mark.skipif(NODE is None or NPM is None, reason="Node.js and npm are not installed"),
        ],
    ),
]
"""For `pytest.mark.parametrize`: the languages."""


class Subscriber(ABC):
    """A subscriber of one tenant's reader, and its file."""

    def __init__(self, folder: Path, *, write: str, nats: str, token: str, tenant: str) -> None:
        """`folder` is for its file and its log."""
        self.tenant = tenant
        self.file = folder / "subscriber"
        self.log = folder / "subscriber.log"
        self._where = ["--write", write, "--nats", nats, "--token", token, "--file", str(self.file)]

    @abstractmethod
    def _program(self) -> list[str]:
        """The command line up to the action."""

    @abstractmethod
    def totals(self, currency: str = "USD") -> tuple[int, int]:
        """How many deposits of a currency it has seen, and their sum."""

    @abstractmethod
    def dead_letters(self) -> list[int]:
        """The positions of the events that it gave up, in order."""

    @abstractmethod
    def break_handler(self) -> None:
        """From its next start on its handler raises for each deposit in BROKEN."""

    @abstractmethod
    def mend_handler(self) -> None:
        """Ends that. The subscriber must not run."""

    @abstractmethod
    def begin_at(self, place: Place) -> None:
        """Puts it behind a place. It must not run."""

    def start(self, action: str = "follow", *more: str) -> subprocess.Popen[bytes]:
        """A process of it, which writes its errors into the log."""
        with self.log.open("ab") as log:
            return subprocess.Popen([*self._program(), action, *self._where, *more], cwd=ROOT, stderr=log)  # noqa: S603 (ours)

    async def run(self, action: str = "follow", *more: str) -> int:
        """The exit code of a run that ends by itself."""
        process = self.start(action, *more)
        try:
            return await asyncio.to_thread(process.wait, ENDS_WITHIN_S)
        finally:
            process.kill()
            process.wait()

    def tries(self, position: int) -> int:
        """How often the log says that the event at a position was tried in vain."""
        return self.log.read_text().count(f"position {position}, try ")


class PythonSubscriber(Subscriber):
    """`examples/subscriber`."""

    def _program(self) -> list[str]:
        return [sys.executable, "-m", "examples.subscriber"]

    def totals(self, currency: str = "USD") -> tuple[int, int]:
        asked = "SELECT deposits, amount_minor FROM totals WHERE tenant = ? AND currency = ?"
        with closing(self._database()) as database:
            return database.execute(asked, (self.tenant, currency)).fetchone() or (0, 0)

    def dead_letters(self) -> list[int]:
        with closing(self._database()) as database:
            return [row[0] for row in database.execute("SELECT position FROM dead_letters ORDER BY position")]

    def break_handler(self) -> None:
        with closing(self._database()) as database:
            database.execute(
                f"CREATE TRIGGER broken BEFORE INSERT ON totals WHEN NEW.currency = '{BROKEN}' "
                "BEGIN SELECT RAISE(ABORT, 'no'); END"
            )

    def mend_handler(self) -> None:
        with closing(self._database()) as database:
            database.execute("DROP TRIGGER broken")

    def begin_at(self, place: Place) -> None:
        Inbox(self.file).close()
        with closing(self._database()) as database:
            row = (place.epoch, place.position, place.event_id)
            database.execute("UPDATE place SET epoch = ?, position = ?, event_id = ?", row)

    def _database(self) -> sqlite3.Connection:
        if not self.file.exists():
            Inbox(self.file).close()
        return sqlite3.connect(self.file, isolation_level=None, timeout=10)


class NodeSubscriber(Subscriber):
    """`examples/subscriber_node`, from a folder with its dependencies."""

    def __init__(self, program: Path, folder: Path, *, write: str, nats: str, token: str, tenant: str) -> None:
        """See `installed`."""
        super().__init__(folder, write=write, nats=nats, token=token, tenant=tenant)
        self._main = str(program / "subscriber.mjs")
        self._where += ["--contracts", str(ROOT / "protos/baseline.binpb")]

    def _program(self) -> list[str]:
        assert NODE is not None
        return [NODE, self._main]

    def totals(self, currency: str = "USD") -> tuple[int, int]:
        found = self._state()["totals"].get(self._key(currency))
        return (found["deposits"], int(found["amountMinor"])) if found and found["deposits"] else (0, 0)

    def dead_letters(self) -> list[int]:
        return sorted(map(int, self._state()["deadLetters"]))

    def break_handler(self) -> None:
        self._save({"totals": {self._key(BROKEN): {"deposits": 0, "amountMinor": "no"}}})

    def mend_handler(self) -> None:
        self._save({"totals": {key: it for key, it in self._state()["totals"].items() if key != self._key(BROKEN)}})

    def begin_at(self, place: Place) -> None:
        self._save({"place": {"epoch": place.epoch, "position": str(place.position), "eventId": place.event_id}})

    def _key(self, currency: str) -> str:
        return json.dumps([self.tenant, currency], separators=(",", ":"))

    def _state(self) -> Any:
        if not self.file.exists():
            return {"place": {"epoch": "", "position": "0", "eventId": ""}, "totals": {}, "deadLetters": {}}
        return json.loads(self.file.read_text())

    def _save(self, changed: dict[str, object]) -> None:
        self.file.write_text(json.dumps({**self._state(), **changed}))


def installed(folder: Path) -> Path:
    """The subscriber in JavaScript with its dependencies, from its lock, in a new folder."""
    shutil.copytree(ROOT / "examples/subscriber_node", folder, ignore=shutil.ignore_patterns("node_modules"))
    assert NPM is not None
    subprocess.run([NPM, "ci", "--no-audit", "--no-fund"], cwd=folder, check=True, capture_output=True, timeout=300)  # noqa: S603 (ours)
    return folder

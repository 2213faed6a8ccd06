"""What the subscriber keeps, in SQLite: its place on the line, the effects of its handler, and the events it gave up on.

Effects and place change in one transaction, so each event takes effect exactly once. Killed anywhere, the transaction is there
as a whole or not at all, and the subscriber goes on behind its place. Two subscribers on one file: the transaction of the
slower one finds another place than it began from, and changes nothing (`Overtaken`).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SCHEMA = """
CREATE TABLE IF NOT EXISTS place (
  only_row INTEGER PRIMARY KEY CHECK (only_row = 1), epoch TEXT NOT NULL, position INTEGER NOT NULL, event_id TEXT NOT NULL);
INSERT OR IGNORE INTO place VALUES (1, '', 0, '');
CREATE TABLE IF NOT EXISTS dead_letters (position INTEGER PRIMARY KEY, type TEXT NOT NULL, error TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS totals (
  tenant TEXT NOT NULL, currency TEXT NOT NULL, deposits INTEGER NOT NULL, amount_minor INTEGER NOT NULL,
  PRIMARY KEY (tenant, currency));
"""


@dataclass(frozen=True, slots=True)
class Event:
    """An event of the line; `version` counts the events of its aggregate."""

    position: int
    event_id: str
    tenant: str
    aggregate_type: str
    aggregate_id: str
    version: int
    type: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Place:
    """How far the line is handled: the last event, in the history that `epoch` names."""

    epoch: str
    position: int
    event_id: str


class Overtaken(Exception):
    """Another subscriber on the same file is further on."""


Handler = Callable[[sqlite3.Connection, Event], None]


class Inbox:
    """The file of one subscriber."""

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(path, isolation_level=None, timeout=10)
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = FULL")
        self._database.executescript(SCHEMA)

    def place(self) -> Place:
        """The last event that was handled."""
        return Place(*self._database.execute("SELECT epoch, position, event_id FROM place").fetchone())

    def begin_anew(self, place: Place) -> None:
        """Forgets all effects and dead letters: the events behind this place are handled again."""
        with self._transaction():
            self._database.execute("DELETE FROM totals")
            self._database.execute("DELETE FROM dead_letters")
            row = (place.epoch, place.position, place.event_id)
            self._database.execute("UPDATE place SET epoch = ?, position = ?, event_id = ?", row)

    def handle(self, epoch: str, event: Event, handler: Handler) -> None:
        """Lets the handler take the event and moves the place, in one transaction. Raises what the handler raises."""
        with self._moving(epoch, event):
            handler(self._database, event)

    def give_up(self, epoch: str, event: Event, error: Exception) -> None:
        """Moves on without an effect; the event is a dead letter until it is replayed."""
        with self._moving(epoch, event):
            row = (event.position, event.type, f"{type(error).__name__}: {error}")
            self._database.execute("INSERT INTO dead_letters VALUES (?, ?, ?)", row)

    def dead_letters(self) -> list[int]:
        """The positions of the events that were given up."""
        return [position for (position,) in self._database.execute("SELECT position FROM dead_letters ORDER BY position")]

    def replay(self, event: Event, handler: Handler) -> None:
        """Lets the handler take a dead letter, which then is none. Raises what the handler raises; then it stays one."""
        with self._transaction():
            gone = self._database.execute("DELETE FROM dead_letters WHERE position = ?", (event.position,)).rowcount
            if gone:
                handler(self._database, event)

    def close(self) -> None:
        """Closes the file."""
        self._database.close()

    @contextmanager
    def _moving(self, epoch: str, event: Event) -> Iterator[None]:
        with self._transaction():
            moved = self._database.execute(
                "UPDATE place SET epoch = ?, position = ?, event_id = ? WHERE position = ?",
                (epoch, event.position, event.event_id, event.position - 1),
            ).rowcount
            if not moved:
                raise Overtaken(f"position {event.position} is not the next one")
            yield

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")

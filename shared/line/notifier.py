"""Notifies listeners that the line has grown, so that they need not wait for their next poll. They do not rely on it."""

from __future__ import annotations

import asyncio

import psycopg

from shared.platform import postgres
from shared.platform.packing import text
from shared.platform.postgres import Connection, Prepared
from shared.platform.telemetry import logger

CHANNEL = "line"
"""The channel of the notifications; their payload is the head."""

PAUSE_S_EACH, PAUSE_S_MAX = 0.001, 0.005
"""The pause after a notification, for each event that it told of, and the longest."""

RETRY_S = 1.0

_NOTIFY = Prepared("SELECT pg_notify($1, $2)")

log = logger(__name__)


def pause_s(events: int) -> float:
    """The pause after a notification of so many events.

    What follows a lone commit is told of soon, since a process may wait for it. Under load, where commits have many events,
    there are no more than two hundred notifications a second.
    """
    return min(events * PAUSE_S_EACH, PAUSE_S_MAX)


class Notifier:
    """Sends a NOTIFY for the first commit after a pause, and one for all commits during the pause, on its own connection.

    A NOTIFY inside the commit would take a lock that all databases of the server share, and delay all commits.
    """

    def __init__(self, database_url: str) -> None:
        self._database_url = database_url
        self._head = 0
        self._grown = asyncio.Event()

    def notify(self, head: int) -> None:
        """Notes that the line has reached `head`."""
        self._head = head
        self._grown.set()

    async def run(self) -> None:
        """Notifies until cancelled. While the database is away, no listener is connected."""
        while True:
            try:
                connection = await postgres.connect(self._database_url, application_name="foldline-notifier")
                async with connection:
                    await self._notify_on(connection)
            except psycopg.Error as error:
                log.debug("notifier_waits", error=type(error).__name__)
                await asyncio.sleep(RETRY_S)

    async def _notify_on(self, connection: Connection) -> None:
        # A notification is a commit too, but it need not be flushed to the disk.
        await connection.execute("SET synchronous_commit = off")
        told = 0
        while True:
            await self._grown.wait()
            self._grown.clear()
            head = self._head
            await _NOTIFY.row(connection, (text(CHANNEL), text(str(head))))
            await asyncio.sleep(pause_s(head - told))
            told = head

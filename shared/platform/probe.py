"""One connection for questions about a database that must not wait for, or take from, the connections that serve calls."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, LiteralString

import psycopg

from shared.platform import postgres
from shared.platform.postgres import Connection


class DatabaseProbe:
    """Asks one question at a time, on a connection that is opened when it is needed and again when it was lost."""

    def __init__(self, url: str, *, application_name: str) -> None:
        self._url = url
        self._application_name = application_name
        self._connection: Connection | None = None
        self._turn = asyncio.Lock()

    async def answers(self) -> str:
        """A check of readiness: empty if the database answers, else why not."""
        try:
            await self.rows("SELECT 1")
        except psycopg.Error as error:
            if not postgres.is_trouble(error):
                raise
            return "the database is away, or cannot answer now"
        return ""

    async def rows(self, query: LiteralString, parameters: Sequence[Any] = ()) -> list[Any]:
        """The rows of a query. Raises psycopg.Error; cancelled, it gives the connection up."""
        async with self._turn:
            try:
                if self._connection is None or self._connection.closed:
                    self._connection = await postgres.connect(self._url, application_name=self._application_name)
                cursor = await self._connection.execute(query, parameters)
                return await cursor.fetchall()
            except BaseException:
                await self.close()
                raise

    async def close(self) -> None:
        """Closes the connection, if there is one."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(psycopg.Error):
                await connection.close()

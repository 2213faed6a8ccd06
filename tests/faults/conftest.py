"""Fixtures of the recovery matrix."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from deploy.local.system import WRITE
from tests.support.system.engines import Engines
from tests.support.system.mail import Mailbox
from tests.support.system.matrix import Matrix
from tests.support.system.stack import Stack


@pytest.fixture(scope="module")
def quiet(engines: Engines, shared_mailbox: Mailbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A system of which only the write service runs."""
    folder = tmp_path_factory.mktemp("matrix")
    stack = Stack(folder, engines.databases(), engines.postgres, engines.nats, shared_mailbox)

    async def start() -> None:
        stack.start(WRITE)
        await stack.wait_ready(WRITE)

    try:
        asyncio.run(start())
        yield stack
    finally:
        asyncio.run(stack.stop_all())


@pytest.fixture
async def matrix(quiet: Stack, engines: Engines, tmp_path: Path) -> AsyncIterator[Matrix]:
    """Worlds on it."""
    async with quiet.channel(WRITE) as write:
        yield Matrix(quiet, engines, write, tmp_path)


@pytest.fixture
async def own_matrix(private_engines: Engines, mailbox: Mailbox, tmp_path: Path) -> AsyncIterator[Matrix]:
    """Worlds on a system of which only the write service runs, and whose database may restart."""
    engines = private_engines
    stack = Stack(tmp_path / "stack", engines.databases(), engines.postgres, engines.nats, mailbox)
    try:
        stack.start(WRITE)
        await stack.wait_ready(WRITE)
        async with stack.channel(WRITE) as write:
            yield Matrix(stack, engines, write, tmp_path)
    finally:
        await stack.stop_all()

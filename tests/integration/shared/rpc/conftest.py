"""Servers that serve persons as a test says."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.system.people import MakeWorld, World


@pytest.fixture
async def make_world(tmp_path: Path) -> AsyncIterator[MakeWorld]:
    """Makes servers with settings of the test's choice."""
    made: list[World] = []

    async def make(**settings: Any) -> World:
        world = World(tmp_path, **settings)
        await world.start()
        made.append(world)
        return world

    yield make
    for world in made:
        await world.channel.close()
        await world.server.drain()


@pytest.fixture
async def world(make_world: MakeWorld) -> World:
    """A server with the usual settings."""
    return await make_world()

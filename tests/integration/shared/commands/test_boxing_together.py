"""What is boxed with an aggregate: a command that is refused has moved none of it."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import pytest

from deploy.bootstrap import Database
from shared.commands.registry import CommandRegistry
from tests.integration.shared.commands.test_boxing import filled, online, refusal_of
from tests.support.domains.trial import COUNTER, Add, Move, Moved, build_registry
from tests.support.fakes.replica import replica
from tests.support.system.boxing import boxer, files_in, move


def together() -> CommandRegistry:
    """Counters are boxed with those that they have moved something to."""
    registry = build_registry()
    registry.rows_of(COUNTER).box_with(Moved, COUNTER, id=lambda e: e.to_id)
    return registry


async def family(database: Database) -> None:
    """The counter `whole` with 4 events, boxed with `small` (2 events) and then `large` (13 events)."""
    await filled(database, "large")
    async with replica(database, build_registry()) as one:
        await one.ask_one(Add(counter_id="small", amount=1))
        for amount in (20, 20):
            await one.ask_one(Add(counter_id="whole", amount=amount))
        for name in ("small", "large"):
            await one.ask_one(Move(counter_id="whole", to_id=name, amount=1))


async def sizes(database: Database) -> list[int]:
    """How many events are in the tables of each counter."""
    return [len(await online(database, name)) for name in ("whole", "small", "large")]


async def test_a_part_that_is_too_large_keeps_all_on_the_line(
    write_db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that would have gone before it; the refusal names it. So does a whole that is too large."""
    await family(write_db)
    async with boxer(write_db.app, files_in(tmp_path), together()) as one:
        for limit in (12, 3):
            monkeypatch.setattr("shared.commands.boxing.EVENTS_MAX", limit)
            assert await refusal_of(move(one, "box", "whole", str(uuid4()))) == "BOX_TOO_LARGE"
            assert await sizes(write_db) == [4, 2, 13]
        monkeypatch.setattr("shared.commands.boxing.EVENTS_MAX", 13)
        await move(one, "box", "whole", str(uuid4()))
        assert await sizes(write_db) == [1, 1, 1]


async def test_what_the_whole_is_refused_for_moves_no_part(write_db: Database, tmp_path: Path) -> None:
    """A stale version, unboxing what is not boxed, boxing what is boxed: the parts stay where each of them is."""
    await family(write_db)
    async with boxer(write_db.app, files_in(tmp_path), together()) as one:
        assert await refusal_of(move(one, "box", "whole", str(uuid4()), 3)) == "VERSION_MISMATCH"
        assert await sizes(write_db) == [4, 2, 13]
        await move(one, "box", "large", str(uuid4()))
        assert await refusal_of(move(one, "unbox", "whole", str(uuid4()))) == "AGGREGATE_NOT_BOXED"
        assert await sizes(write_db) == [4, 2, 1]
        await move(one, "box", "whole", str(uuid4()), 4)
        await move(one, "unbox", "large", str(uuid4()))
        assert await refusal_of(move(one, "box", "whole", str(uuid4()))) == "AGGREGATE_BOXED"
        assert await refusal_of(move(one, "unbox", "whole", str(uuid4()), 4)) == "VERSION_MISMATCH"
        assert await sizes(write_db) == [1, 1, 15]
        await move(one, "unbox", "whole", str(uuid4()), 5)
        assert await sizes(write_db) == [6, 4, 15]

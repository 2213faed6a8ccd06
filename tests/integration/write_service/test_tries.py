"""Wrong passwords are counted in the database: over all replicas, within a minute, and no more than is allowed at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import psycopg
import pytest

from deploy.bootstrap import Database
from shared.platform.postgres import Reads
from write_service.tries import Tries


@pytest.fixture
async def replicas(write_db: Database) -> AsyncIterator[tuple[Tries, Tries]]:
    """Two replicas of the write service."""
    reads = [Reads(write_db.app, application_name=f"replica {number}") for number in range(2)]
    for each in reads:
        await each.open()
    yield Tries(reads[0], per_login=5, per_tenant=20), Tries(reads[1], per_login=5, per_tenant=20)
    for each in reads:
        await each.close()


async def test_replicas_count_together(replicas: tuple[Tries, Tries]) -> None:
    """As many as are allowed, though all come at once; another login and another tenant have their own."""
    one, other = replicas
    allowed = await asyncio.gather(*[replica.count("acme", "alice") for replica in (one, other) for _ in range(10)])
    assert sum(allowed) == 5
    assert await one.count("acme", "bob")
    assert await other.count("umbrella", "alice")


async def test_a_right_password_forgives(replicas: tuple[Tries, Tries]) -> None:
    """The login's tries are none again; of the tenant's one is."""
    one, other = replicas
    for _ in range(4):
        assert all([await one.count("acme", "alice") for _ in range(5)])
        assert not await one.count("acme", "alice")
        await other.forget("acme", "alice")
    assert [await one.count("acme", f"login {number}") for number in range(5)] == [True] * 4 + [False]


async def test_a_tenant_has_a_limit_over_all_its_logins(replicas: tuple[Tries, Tries]) -> None:
    """What is refused is not counted against the login."""
    one, _ = replicas
    assert all([await one.count("acme", f"login {number}") for number in range(20)])
    for _ in range(30):
        assert not await one.count("acme", "the next")
    assert await one.count("umbrella", "the next")


async def test_tries_are_forgotten_after_a_minute(replicas: tuple[Tries, Tries], write_db: Database) -> None:
    """Those of two minutes ago are gone from the table; those of one minute ago count as far as they lie within sixty seconds."""
    one, _ = replicas
    for _ in range(5):
        await one.count("acme", "alice")
    with psycopg.connect(write_db.owner, autocommit=True) as owner:
        owner.execute("UPDATE password_tries SET minute = minute - 2")
        assert all([await one.count("acme", "alice") for _ in range(5)])
        assert owner.execute("SELECT count(*) FROM password_tries").fetchall() == [(2,)]
        owner.execute("UPDATE password_tries SET minute = minute - 1, tries = 1000")
    assert not await one.count("acme", "alice")


async def test_the_service_may_count_and_nothing_else(write_db: Database) -> None:
    """The application role cannot read or change the table itself."""
    with psycopg.connect(write_db.app, autocommit=True) as app:
        for statement in ("SELECT * FROM password_tries", "DELETE FROM password_tries", "UPDATE password_tries SET tries = 0"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                app.execute(statement)

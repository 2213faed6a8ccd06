"""Tenants that are closed: no command is carried out for them, and nothing is appended or scheduled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from psycopg.errors import SerializationFailure

from shared.folds.errors import Rejected
from shared.platform.packing import texts
from shared.platform.postgres import Connection


async def closed_among(connection: Connection, tenants: Iterable[str]) -> frozenset[str]:
    """Those of the tenants that are closed."""
    cursor = await connection.execute("SELECT tenant FROM tenant_purges WHERE tenant = ANY (%s)", (texts(sorted(tenants)),))
    return frozenset(tenant for (tenant,) in await cursor.fetchall())


async def refuse_closed(connection: Connection, tenant: str) -> None:
    """Raises Rejected (TENANT_CLOSED) if the tenant is closed."""
    if await closed_among(connection, [tenant]):
        raise tenant_closed()


async def keep_archive(connection: Connection, tenant: str) -> None:
    """Has the purge of a tenant's archive wait for as long as the connection lives, which must lead to the server itself.

    Whoever writes there calls this first, and then looks whether the tenant is closed.
    """
    await connection.execute("SELECT pg_advisory_lock_shared(hashtextextended('archive of ' || %s, 0))", (tenant,))


async def await_archive(connection: Connection, tenant: str) -> None:
    """Waits until nobody keeps a tenant's archive. If the tenant is closed, nobody writes there from then on."""
    await connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('archive of ' || %s, 0))", (tenant,))


def tenant_closed() -> Rejected:
    """The refusal of whatever is for a tenant that is closed."""
    return Rejected("TENANT_CLOSED", "the tenant is closed for ever: its data is being deleted, or is gone")


@contextmanager
def refused_if_closed() -> Iterator[None]:
    """For a call of a function that fails to serialize for one reason alone: then raises Rejected (TENANT_CLOSED)."""
    try:
        yield
    except SerializationFailure:
        raise tenant_closed() from None

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

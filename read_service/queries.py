"""What the query tables are asked: SQL in functions.

Every query runs in a transaction that first names the tenant, because the tables' policies show the rows of that tenant
and no others. The queries name it too, so that they use the indexes; were one to forget it, it would show nothing of
another tenant. Names, never values, are put into the text of a query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from shared.platform.postgres import Reads

Page = Sequence[Any] | None
"""The sort keys of the last row that was shown, the id last; None for the first page."""


@dataclass(frozen=True, slots=True)
class Person:
    """A person and what is on all of their accounts: amounts as decimal text, by currency."""

    person_id: str
    name: str
    name_folded: str
    registered_at: datetime
    open_account_count: int
    version: int
    currencies: list[str]
    totals_minor: list[str]


@dataclass(frozen=True, slots=True)
class Account:
    """An account."""

    account_id: str
    owner_id: str
    name: str
    currency: str
    balance_minor: int
    status: str
    opened_at: datetime
    version: int


@dataclass(frozen=True, slots=True)
class Movement:
    """A line of an account's statement."""

    version: int
    amount_minor: int
    balance_after_minor: int
    moved_at: datetime
    transfer_id: str
    counterparty_account_id: str


@dataclass(frozen=True, slots=True)
class Transfer:
    """A transfer; a step that has not happened has no time."""

    transfer_id: str
    from_account_id: str
    to_account_id: str
    amount_minor: int
    currency: str
    status: str
    reason: str
    compensation: int
    started_at: datetime
    debited_at: datetime | None
    credited_at: datetime | None
    refunded_at: datetime | None
    suspended_at: datetime | None
    ended_at: datetime | None


@dataclass(frozen=True, slots=True)
class User:
    """A user and what became of the registration."""

    user_id: str
    login: str
    email: str
    status: str
    reason: str
    started_at: datetime
    ended_at: datetime | None


@dataclass(frozen=True, slots=True)
class Order:
    """How a list is sorted: by a column and then by id, both in the same direction."""

    column: str
    descending: bool = False


_PERSON = """
SELECT p.person_id, p.name, p.name_folded, p.registered_at, p.open_account_count, p.version, t.currencies, t.totals
FROM people p, LATERAL (
  SELECT coalesce(array_agg(currency ORDER BY currency), '{}') AS currencies,
         coalesce(array_agg(total_minor::text ORDER BY currency), '{}') AS totals
  FROM person_totals WHERE tenant = p.tenant AND person_id = p.person_id) t
WHERE p.tenant = %(tenant)s
"""

_ACCOUNT = """
SELECT account_id, owner_id, name, currency, balance_minor, status, opened_at, version
FROM accounts p WHERE p.tenant = %(tenant)s
"""

_MOVEMENTS = """
SELECT p.version, p.amount_minor, p.balance_after_minor, p.moved_at, p.transfer_id, p.counterparty_account_id
FROM movements p WHERE p.tenant = %(tenant)s AND p.account_id = %(account_id)s
"""

_TRANSFER = """
SELECT p.transfer_id, p.from_account_id, p.to_account_id, p.amount_minor, p.currency, p.status, p.reason, p.compensation,
       p.started_at, p.debited_at, p.credited_at, p.refunded_at, p.suspended_at, p.ended_at
FROM transfers p WHERE p.tenant = %(tenant)s
"""

_USER = """
SELECT p.user_id, p.login, p.email, p.status, p.reason, p.started_at, p.ended_at
FROM users p WHERE p.tenant = %(tenant)s
"""


async def in_tenant(reads: Reads, tenant: str, query: str, values: dict[str, Any]) -> list[tuple[Any, ...]]:
    """The rows of a query, as that tenant sees them. One round trip. Raises Unavailable."""
    async with reads.connection() as connection, connection.pipeline():
        await connection.execute("BEGIN READ ONLY")
        await connection.execute("SELECT set_config('app.tenant', %s, true)", [tenant])
        cursor = await connection.execute(query, {"tenant": tenant, **values})
        await connection.execute("COMMIT")
        return await cursor.fetchall()


async def get_person(reads: Reads, tenant: str, person_id: str) -> Person | None:
    """One person of the tenant."""
    rows = await in_tenant(reads, tenant, f"{_PERSON} AND p.person_id = %(id)s", {"id": person_id})
    return Person(*rows[0]) if rows else None


async def list_persons(reads: Reads, tenant: str, order: Order, after: Page, limit: int, *, folded_prefix: str) -> list[Person]:
    """Up to `limit` people of the tenant; those whose folded name begins with the prefix."""
    query, values = _PERSON, {}
    if folded_prefix:
        query += " AND p.name_folded >= %(prefix)s"
        values["prefix"] = folded_prefix
        if end := prefix_end(folded_prefix):
            query += " AND p.name_folded < %(prefix_end)s"
            values["prefix_end"] = end
    query, values = _page(query, values, order, "person_id", after, limit)
    return [Person(*row) for row in await in_tenant(reads, tenant, query, values)]


async def get_account(reads: Reads, tenant: str, account_id: str) -> Account | None:
    """One account of the tenant."""
    rows = await in_tenant(reads, tenant, f"{_ACCOUNT} AND p.account_id = %(id)s", {"id": account_id})
    return Account(*rows[0]) if rows else None


async def list_accounts(
    reads: Reads, tenant: str, order: Order, after: Page, limit: int, *, owner_id: str, status: str, currency: str
) -> list[Account]:
    """Up to `limit` accounts of the tenant; an empty filter lets all pass."""
    query, values = _ACCOUNT, {}
    for column, wanted in (("owner_id", owner_id), ("status", status), ("currency", currency)):
        if wanted:
            query += f" AND p.{column} = %({column})s"
            values[column] = wanted
    query, values = _page(query, values, order, "account_id", after, limit)
    return [Account(*row) for row in await in_tenant(reads, tenant, query, values)]


async def list_movements(reads: Reads, tenant: str, account_id: str, before: int | None, limit: int) -> list[Movement]:
    """Up to `limit` movements of an account, the newest first; those before a version, if one is given."""
    query, values = _MOVEMENTS, {"account_id": account_id, "limit": limit}
    if before is not None:
        query += " AND p.version < %(before)s"
        values["before"] = before
    query += " ORDER BY p.version DESC LIMIT %(limit)s"
    return [Movement(*row) for row in await in_tenant(reads, tenant, query, values)]


async def get_transfer(reads: Reads, tenant: str, transfer_id: str) -> Transfer | None:
    """One transfer of the tenant."""
    rows = await in_tenant(reads, tenant, f"{_TRANSFER} AND p.transfer_id = %(id)s", {"id": transfer_id})
    return Transfer(*rows[0]) if rows else None


async def list_transfers(
    reads: Reads, tenant: str, order: Order, after: Page, limit: int, *, account_id: str, status: str
) -> list[Transfer]:
    """Up to `limit` transfers of the tenant, from or to an account; an empty filter lets all pass."""
    query, values = _TRANSFER, {}
    if account_id:
        query += " AND (p.from_account_id = %(account_id)s OR p.to_account_id = %(account_id)s)"
        values["account_id"] = account_id
    if status:
        query += " AND p.status = %(status)s"
        values["status"] = status
    query, values = _page(query, values, order, "transfer_id", after, limit)
    return [Transfer(*row) for row in await in_tenant(reads, tenant, query, values)]


async def get_user(reads: Reads, tenant: str, user_id: str) -> User | None:
    """One user of the tenant."""
    rows = await in_tenant(reads, tenant, f"{_USER} AND p.user_id = %(id)s", {"id": user_id})
    return User(*rows[0]) if rows else None


async def list_users(reads: Reads, tenant: str, order: Order, after: Page, limit: int, *, status: str) -> list[User]:
    """Up to `limit` users of the tenant; an empty filter lets all pass."""
    query, values = _USER, {}
    if status:
        query += " AND p.status = %(status)s"
        values["status"] = status
    query, values = _page(query, values, order, "user_id", after, limit)
    return [User(*row) for row in await in_tenant(reads, tenant, query, values)]


def prefix_end(prefix: str) -> str:
    """The first text, in byte order, behind all that begin with the prefix; empty if there is none."""
    while prefix:
        following = ord(prefix[-1]) + 1
        if following == 0xD800:  # the surrogates are no characters
            following = 0xE000
        if following <= 0x10FFFF:
            return prefix[:-1] + chr(following)
        prefix = prefix[:-1]
    return ""


def _page(
    query: str, values: dict[str, Any], order: Order, id_column: str, after: Page, limit: int
) -> tuple[str, dict[str, Any]]:
    direction, beyond = ("DESC", "<") if order.descending else ("ASC", ">")
    if after is not None:
        query += f" AND (p.{order.column}, p.{id_column}) {beyond} (%(after)s, %(after_id)s)"
        values = {**values, "after": after[0], "after_id": after[1]}
    query += f" ORDER BY p.{order.column} {direction}, p.{id_column} {direction} LIMIT %(limit)s"
    return query, {**values, "limit": limit}

"""The query for an account's statement: its movements within ranges of moments and amounts, by version or against it.

Movements are recorded in the order of their versions (`append_batch`: no event is recorded before the one in front of it), so a
range of moments is one of versions. Its ends are found by halving, and the primary key serves it.

No index serves a range of amounts: each movement would write one entry more, at a random place, which costs a projector more than
half of what the movement's row does. So a page reads at most READ_MAX movements, and goes on behind them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from foldline.v1 import range_pb2
from read_service.projections.accounts import MovementRow
from shared.folds.summary import Condition, Filter, moment_between, whole_between
from shared.projections.filtering import Found, branches_of
from shared.rpc import pages

READ_MAX = 1000
"""Movements that a page reads to find those of a range of amounts."""

_COLUMNS = ", ".join(MovementRow._fields)
_SELECT = f"SELECT {_COLUMNS} FROM movements p WHERE p.tenant = %(tenant)s AND p.account_id = %(account_id)s"  # noqa: S608 - names of ours
_VERSION_THEN = "(SELECT first_movement_since(%(tenant)s, %(account_id)s, {}))"


def _moved_between(given: range_pb2.TimeRange) -> Sequence[Condition]:
    """As moment_between, by versions."""
    return [
        it._replace(sql=tuple(text.replace("p.moved_at", "p.version").replace("{}", _VERSION_THEN) for text in it.sql))
        for it in _MOVED_AT.conditions(given)
    ]


_MOVED_AT = moment_between("moved_at")
FILTERS: Mapping[str, Filter] = {
    "amount_minor": whole_between("amount_minor"),
    "moved_at": replace(_MOVED_AT, conditions=_moved_between),
}


class Place(NamedTuple):
    """Behind which version a page begins, and below which its rows are: 0 for any."""

    version: int
    below: int


def statement_query(
    account_id: str, found: Found, after: Place, limit: int, *, oldest_first: bool = False
) -> tuple[str, dict[str, Any]]:
    """The query for `limit` rows of a statement, and its values without the tenant's.

    The last column of a row is true for one more: the last that was read, if READ_MAX were.
    """
    direction, back, beyond = ("ASC", "DESC", ">") if oldest_first else ("DESC", "ASC", "<")
    values: dict[str, Any] = {"account_id": account_id, "limit": limit}
    [sql] = branches_of(_SELECT, {"moved_at": found["moved_at"]}, values)
    if after.below:
        sql += " AND p.version < %(below)s"
        values["below"] = after.below
    if after.version:
        sql += f" AND p.version {beyond} %(version)s"
        values["version"] = after.version
    ordered = f"ORDER BY p.version {direction} LIMIT"
    if not found["amount_minor"]:
        return f"SELECT p.*, false FROM ({sql} {ordered} %(limit)s) p ORDER BY p.version {direction}", values  # noqa: S608
    values["read_max"] = READ_MAX
    [within] = branches_of("SELECT p.*, false AS more FROM read p WHERE true", {"amount_minor": found["amount_minor"]}, values)
    return (
        f"WITH read AS MATERIALIZED ({sql} {ordered} %(read_max)s) ({within} {ordered} %(limit)s) UNION ALL "  # noqa: S608
        f"(SELECT p.*, true FROM read p WHERE (SELECT count(*) FROM read) = %(read_max)s ORDER BY p.version {back} LIMIT 1)",
        values,
    )


def cut(rows: Sequence[tuple[Any, ...]], size: int, query: Sequence[str], below: int) -> tuple[Sequence[MovementRow], str]:
    """The movements of a page and the token of the next, of the answer to a query for one more than `size`."""
    found = [MovementRow(*row[:-1]) for row in rows if not row[-1]]
    shown, following = pages.cut(found, size, query, lambda row: (row.version, below))
    if not following and rows and rows[-1][-1]:
        following = pages.encode(query, (MovementRow(*rows[-1][:-1]).version, below))
    return shown, following

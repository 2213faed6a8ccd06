"""Pages of a list: keyset pagination with opaque tokens that belong to one query.

A token holds the sort keys of the last row shown. So every page costs the same, and rows that are added or removed between two
pages do not shift the others. A digest binds the token to its query (caller, filter, order), because sort keys of one order
mean nothing in another. The token is no secret and gives no access: rows are read under the caller's own tenant.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar
from uuid import UUID

import orjson

from shared.folds.errors import Invalid
from shared.platform import base64url

Item = TypeVar("Item")

SIZE_DEFAULT = 50

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def encode(query: Sequence[str], keys: Sequence[str | int]) -> str:
    """The token that goes on behind the row with these sort keys."""
    return base64url.encode(orjson.dumps([_digest(query), *keys]))


def decode(query: Sequence[str], token: str, kinds: Sequence[type]) -> list[Any] | None:
    """The sort keys to go on behind, None for an empty token.

    Raises Invalid for a token that was not made for this query or does not hold keys of these kinds.
    """
    if not token:
        return None
    try:
        raw = base64url.decode(token)
        digest, *keys = orjson.loads(raw)
        values: list[Any] = keys
    except (ValueError, TypeError) as error:
        raise invalid("is not a page token") from error
    if digest != _digest(query):
        raise invalid("belongs to another query: every other field must be as it was")
    if [type(value) for value in values] != list(kinds) or not all(map(_storable, values)):
        raise invalid("is not a page token")
    return values


def moment_key(moment: datetime) -> int:
    """A sort key of a moment: microseconds since 1970."""
    return (moment - _EPOCH) // timedelta(microseconds=1)


def moment_of(key: int) -> datetime:
    """The moment of a sort key. Raises Invalid for one that no row can have."""
    try:
        return _EPOCH + timedelta(microseconds=key)
    except OverflowError:
        raise invalid("is not a page token") from None


def uuid_of(key: str) -> str:
    """A sort key that is a UUID. Raises Invalid for one that no row can have."""
    try:
        return str(UUID(key))
    except ValueError:
        raise invalid("is not a page token") from None


def cut(
    rows: Sequence[Item], size: int, query: Sequence[str], keys: Callable[[Item], Sequence[str | int]]
) -> tuple[Sequence[Item], str]:
    """The rows of a page and the token of the next; `rows` has one more than `size` if there is a next page."""
    if len(rows) <= size:
        return rows, ""
    return rows[:size], encode(query, keys(rows[size - 1]))


def _storable(value: str | int) -> bool:
    """Whether a key can be one of a row: a database takes neither the character NUL nor more than 64 bits."""
    return "\0" not in value if isinstance(value, str) else -(2**63) <= value < 2**63


def _digest(query: Sequence[str]) -> str:
    return hashlib.sha256(orjson.dumps(list(query))).hexdigest()[:16]


def invalid(description: str) -> Invalid:
    """The refusal of a page token: `description` goes on from "page_token"."""
    return Invalid("PAGE_TOKEN_INVALID", f"page_token {description}", violations=(("page_token", description),))

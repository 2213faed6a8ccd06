"""Rows of queries: pages, orders, filters, masks, consistency."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from shared.rpc import pages
from tests.e2e.errors.row import BEYOND, INT64_MAX, Row, bad, token_of, watch
from tests.e2e.scene import NIL, Place, Scene

MASKED: dict[str, Callable[..., Awaitable[object]]] = {
    "persons": lambda s, p, **more: s.persons(**more),
    "accounts": lambda s, p, **more: s.accounts(**more),
    "movements": lambda s, p, **more: s.movements(account_id=p.blue, **more),
}
"""Lists whose answers can be masked; Get and the other lists are answered by the same code."""

CONSISTENT: dict[str, Callable[[Scene, str], Awaitable[object]]] = {
    "an account": lambda s, token: s.bank.account(s.place.blue, token),
    "accounts": lambda s, token: s.accounts(consistency_token=token),
    "movements": lambda s, token: s.movements(account_id=s.place.blue, consistency_token=token),
    "totals": lambda s, token: s.totals(consistency_token=token),
    "a watch": lambda s, token: watch(s, "account", "WatchAccount", account_id=s.place.blue, consistency_token=token),
    "a watched list": lambda s, token: watch(s, "account", "WatchAccounts", consistency_token=token),
}

QUERIES = [
    bad("page: negative size", lambda s, p: s.persons(page_size=-1), "page_size"),
    bad("page: more than 500", lambda s, p: s.accounts(page_size=501), "page_size"),
    *(
        bad(f"read_mask of {what}: {why}", lambda s, p, ask=ask, paths=paths: ask(s, p, read_mask={"paths": paths}), "read_mask")  # type: ignore[misc]
        for what, ask in MASKED.items()
        for why, paths in (("no field", ["version", "nonsense"]), ("too many", ["version"] * 65))
    ),
    bad("statement: by amount", lambda s, p: s.movements(account_id=p.blue, order_by="amount_minor"), "order_by"),
    bad(
        "statement: no moment",
        lambda s, p: s.movements(account_id=p.blue, filter={"moved_at": {"since": BEYOND}}),
        "filter.moved_at",
    ),
    bad("statement: more than 500", lambda s, p: s.movements(account_id=p.blue, page_size=501), "page_size"),
    bad("order: unknown", lambda s, p: s.persons(order_by="shoe_size"), "order_by"),
    bad("order: a column that is not offered", lambda s, p: s.accounts(order_by="tenant"), "order_by"),
    bad("order: SQL", lambda s, p: s.accounts(order_by="opened_at; DROP TABLE accounts"), "order_by"),
    bad("filter: owner that is no UUID", lambda s, p: s.accounts(filter={"owner_id": "alice"}), "filter.owner_id"),
    bad("filter: unknown status", lambda s, p: s.accounts(filter={"status": 99}), "filter.status"),
    bad("filter: currency of two letters", lambda s, p: s.accounts(filter={"currency": "US"}), "filter.currency"),
    bad("filter: currency of NULs", lambda s, p: s.accounts(filter={"currency": "\0" * 3}), "filter.currency"),
    bad("filter: prefix of 201", lambda s, p: s.persons(filter={"name_prefix": "x" * 201}), "filter.name_prefix"),
    bad("filter: no moment", lambda s, p: s.persons(filter={"registered_at": {"since": BEYOND}}), "filter.registered_at"),
    Row(
        "filter: in an order that no index gives",
        lambda s, p: s.persons(filter={"name_prefix": "a"}, order_by="registered_at"),
        "INVALID_ARGUMENT",
        "FILTER_NEEDS_ORDER",
        ("order_by",),
    ),
    bad("page token: 17 KB", lambda s, p: s.persons(page_token="x" * 17_000), "page_token"),
    bad("page token of accounts: 3 KB", lambda s, p: s.accounts(page_token="x" * 3000), "page_token"),
    Row(
        "page token: garbage",
        lambda s, p: s.persons(page_token="?!"),
        "INVALID_ARGUMENT",
        "PAGE_TOKEN_INVALID",
        ("page_token",),
    ),
    Row(
        "page token: of another order",
        lambda s, p: _paged(s, {"order_by": "opened_at"}, {"order_by": "opened_at desc"}),
        "INVALID_ARGUMENT",
        "PAGE_TOKEN_INVALID",
        ("page_token",),
    ),
    Row(
        "page token: of another filter",
        lambda s, p: _paged(s, {}, {"filter": {"currency": "USD"}}),
        "INVALID_ARGUMENT",
        "PAGE_TOKEN_INVALID",
        ("page_token",),
    ),
    Row(
        "page token: of another tenant",
        lambda s, p: _paged(s, {}, {"bank": s.by(tenant=p.other_tenant)}),
        "INVALID_ARGUMENT",
        "PAGE_TOKEN_INVALID",
        ("page_token",),
    ),
    Row(
        "page token: of another list",
        lambda s, p: _paged(s, {}, {}, then=s.persons),
        "INVALID_ARGUMENT",
        "PAGE_TOKEN_INVALID",
        ("page_token",),
    ),
    Row(
        "page token: forged, a time beyond all calendars",
        lambda s, p: s.accounts(page_token=pages.encode(_accounts_query(p), (INT64_MAX, p.blue))),
        "INVALID_ARGUMENT",
        "PAGE_TOKEN_INVALID",
        ("page_token",),
    ),
    Row(
        "page token: forged, an id with NUL",
        lambda s, p: s.accounts(page_token=pages.encode(_accounts_query(p), (0, "\0"))),
        "INVALID_ARGUMENT",
        "PAGE_TOKEN_INVALID",
        ("page_token",),
    ),
    Row(
        "page token: forged, a version beyond 64 bits",
        lambda s, p: s.movements(account_id=p.blue, page_token=pages.encode(_statement(p), (2**64 - 1, 0))),
        "INVALID_ARGUMENT",
        "PAGE_TOKEN_INVALID",
        ("page_token",),
    ),
    bad("consistency token: 600 characters", lambda s, p: s.bank.account(p.blue, "x" * 600), "consistency_token"),
    Row(
        "consistency token: garbage",
        lambda s, p: s.bank.account(p.blue, "garbage"),
        "INVALID_ARGUMENT",
        "CONSISTENCY_TOKEN_MALFORMED",
        ("consistency_token",),
    ),
    Row(
        "consistency token: of another shard",
        lambda s, p: s.bank.person(p.alice, token_of(s, p, shard=7)),
        "INVALID_ARGUMENT",
        "CONSISTENCY_TOKEN_OF_ANOTHER_SHARD",
        ("consistency_token",),
    ),
    Row(
        "consistency token: the tables are not there yet",
        lambda s, p: s.bank.account(p.blue, token_of(s, p, position=10**9)),
        "FAILED_PRECONDITION",
        "NOT_YET_CONSISTENT",
        waiting_helps=True,
    ),
    *(
        Row(f"consistency token of {what}: {why}", lambda s, p, ask=ask, made=made: ask(s, token_of(s, p, **made)), *refusal)  # type: ignore[misc]
        for what, ask in CONSISTENT.items()
        for why, made, refusal in (
            ("beyond all lines", {"position": INT64_MAX}, ("FAILED_PRECONDITION", "TOKEN_UNREACHABLE")),
            ("of another history", {"epoch": f"{NIL}/1"}, ("FAILED_PRECONDITION", "TOKEN_OF_ANOTHER_HISTORY")),
        )
    ),
]


def _statement(place: Place) -> tuple[str, ...]:
    """What a page token of a statement is bound to."""
    return ("ListMovements", place.tenant, place.blue, "False", "", "")


def _accounts_query(place: Place) -> tuple[str, ...]:
    """What the read service binds the page tokens of a plain ListAccounts to."""
    return ("ListAccounts", place.tenant, "opened_at", "False", "", "", "")


async def _paged(
    scene: Scene,
    first: dict[str, Any],
    second: dict[str, Any],
    then: Callable[..., Awaitable[object]] | None = None,
) -> object:
    """Takes the page token of one query of accounts to another."""
    page = await scene.accounts(page_size=1, consistency_token=scene.place.consistency_token, **first)
    assert page.next_page_token
    return await (then or scene.accounts)(page_size=1, page_token=page.next_page_token, **second)

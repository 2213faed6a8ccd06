"""What the filter and the order of a list ask for: conditions, an order that an index gives with them, and parts of a query."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from shared.folds.errors import Invalid
from shared.folds.summary import Condition, Filter
from shared.rpc.bounds import rules_broken

Found = Mapping[str, Sequence[Condition]]
"""The conditions of each filter; none where the request has nothing."""


def conditions_of(filters: Mapping[str, Filter], asked: Any) -> tuple[Found, Sequence[str]]:
    """The conditions of each filter, and texts that bind a page token to them. Raises Invalid for what is no moment."""
    found = {}
    for name, by in filters.items():
        try:
            found[name] = by.conditions(getattr(asked, name))
        except (ValueError, OverflowError):
            raise rules_broken((f"filter.{name}", "must have moments of the years 1 to 9999")) from None
    return found, [" ".join(f"{it.sql[0]} {it.value}" for it in conditions) for conditions in found.values()]


def order_of(
    asked: str,
    found: Found,
    *,
    orders: Sequence[str],
    only_in: Mapping[str, Sequence[str]],
    apart: Mapping[tuple[str, str], str] | None = None,
) -> str:
    """The order of a list: as asked, or the first that an index gives with all filters. Raises Invalid FILTER_NEEDS_ORDER.

    `only_in` and `apart` are as in `shared.folds.summary.Summary`.
    """
    given = {name for name, conditions in found.items() if conditions}
    for pair, with_too in (apart or {}).items():
        if given.issuperset(pair) and with_too not in given:
            raise _order_needed(f"no order goes with both {pair[0]} and {pair[1]}, unless {with_too} is given as well")
    served = [only_in[name] for name in given if name in only_in]
    fit = [order for order in orders if all(order in names for names in served)]
    if fit and (not asked or asked.removesuffix(" desc") in fit):
        return asked or fit[0]
    raise _order_needed(f"with these filters it must be {' or '.join(fit)}" if fit else "no order goes with all of these filters")


def branches_of(select: str, found: Found, values: dict[str, Any]) -> Sequence[str]:
    """The queries that find the rows which meet all conditions, each row in one; adds the conditions' values."""
    branches = [select]
    for name, conditions in found.items():
        for nth, condition in enumerate(conditions):
            values[f"{name}_{nth}"] = condition.value
            branches = [f"{sql} AND {text.format(f'%({name}_{nth})s')}" for sql in branches for text in condition.sql]
    return branches


def needed_behind(found: Found, column: str, key: Any, *, descending: bool) -> Found:
    """The conditions that are left to be asked of rows behind `key` in the order of a column.

    A bound on the side where the order begins is met by all that are behind a row that meets it. Given both, PostgreSQL reads an
    index from that bound on, and passes over every row up to the key: a page would cost as much as all pages before it.
    """
    at, met = SimpleNamespace(**{column: key}), (column, descending)
    return {name: [it for it in conditions if it.bound != met or not it.holds(at)] for name, conditions in found.items()}


def _order_needed(text: str) -> Invalid:
    return Invalid("FILTER_NEEDS_ORDER", f"order_by: {text}", violations=(("order_by", text),))

"""The most that was ever on each account.

The row, then folds, then the table of which event goes to which fold, then the summary that is shown.
"""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from bank.v1 import account_pb2
from foldline.v1.event_store_pb2 import EventEnvelope
from shared.folds.moments import set_moment
from shared.folds.projection import Projection, Purge, existing, on, recorded_at, storable
from shared.folds.summary import (
    History,
    Summary,
    begins_with,
    equals,
    has,
    is_id,
    moment_between,
    rows_of,
    whole_between,
)
from shared.folds.table import Code, Table, by
from tests.domains.peaks import peak_query_pb2

OPEN, CLOSED = "open", "closed"


class PeakRow(NamedTuple):
    """A row of `peaks`. `emptied_at` is None until money was taken and nothing was left."""

    tenant: Code
    peak_id: Code
    owner_id: Code
    name: Code
    currency: Code
    highest_minor: int
    status: Code
    opened_at: datetime
    emptied_at: datetime | None


peaks = Table(
    "peaks",
    PeakRow,
    keys=2,
    indexes=[
        by("opened_at"),
        by("highest_minor"),
        by("owner_id", "opened_at"),
        by("status", "opened_at"),
        by("currency", "opened_at"),
        by("name", "opened_at"),
        by("opened_at", only="emptied_at IS NOT NULL"),
    ],
    filled=80,
)


def opened(_: PeakRow | None, event: account_pb2.AccountOpened, envelope: EventEnvelope) -> PeakRow:
    """Nothing was on it yet."""
    return PeakRow(
        tenant=envelope.tenant,
        peak_id=event.account_id,
        owner_id=event.owner_id,
        name=storable(event.name),
        currency=event.currency,
        highest_minor=0,
        status=OPEN,
        opened_at=recorded_at(envelope),
        emptied_at=None,
    )


def deposited(row: PeakRow | None, event: account_pb2.MoneyDeposited, _: EventEnvelope) -> PeakRow:
    """Perhaps more than ever."""
    peak = existing(row)
    return peak._replace(highest_minor=max(peak.highest_minor, event.balance_after_minor))


def withdrawn(row: PeakRow | None, event: account_pb2.MoneyWithdrawn, envelope: EventEnvelope) -> PeakRow:
    """Perhaps all of it."""
    peak = existing(row)
    return peak if event.balance_after_minor else peak._replace(emptied_at=recorded_at(envelope))


def closed(row: PeakRow | None, _: account_pb2.AccountClosed, __: EventEnvelope) -> PeakRow:
    """It stays as it is."""
    return existing(row)._replace(status=CLOSED)


PEAKS = Projection(
    table=peaks,
    key=lambda event, _: (event.account_id,),
    on=[
        on(account_pb2.AccountOpened, opened),
        on(account_pb2.MoneyDeposited, deposited),
        on(account_pb2.MoneyWithdrawn, withdrawn),
        on(account_pb2.AccountClosed, closed),
    ],
    purges=[Purge("account", "peak_id")],
)

STATUSES = {peak_query_pb2.PEAK_STATUS_OPEN: OPEN, peak_query_pb2.PEAK_STATUS_CLOSED: CLOSED}
STATUS_OF = {text: status for status, text in STATUSES.items()}


def show(row: PeakRow, shown: peak_query_pb2.PeakSummary) -> None:
    """A peak as it is shown."""
    shown.peak_id = row.peak_id
    shown.owner_id = row.owner_id
    shown.name = row.name
    shown.currency = row.currency
    shown.highest_minor = row.highest_minor
    shown.status = STATUS_OF[row.status]
    set_moment(shown.opened_at, row.opened_at)
    set_moment(shown.emptied_at, row.emptied_at)


PEAK = Summary(
    name="peak",
    source=rows_of(peaks),
    show=show,
    history=History("account"),
    orders={"opened_at": "opened_at", "highest_minor": "highest_minor"},
    filters={
        "owner_id": is_id("owner_id"),
        "name_prefix": begins_with("name", str),
        "currency": equals("currency"),
        "status": equals("status", STATUSES),
        "highest_minor": whole_between("highest_minor"),
        "opened_at": moment_between("opened_at"),
        "emptied": has("emptied_at"),
    },
    only_in={"highest_minor": ["highest_minor"], "opened_at": ["opened_at"]},
)

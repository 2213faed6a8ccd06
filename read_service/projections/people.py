"""People: who they are, how many accounts they have open, and what is on them in all.

Rows, then folds, then the table of which event goes to which fold, then the summary that is shown.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from bank.v1 import account_pb2, person_pb2, person_query_pb2
from foldline.v1.event_store_pb2 import EventEnvelope
from shared.folds.moments import set_moment
from shared.folds.projection import MARKS, Projection, Purge, boxed_at, existing, key_of, on, recorded_at, storable
from shared.folds.summary import History, Source, Summary, begins_with, equals, moment_between
from shared.folds.table import BigNumber, Code, Int32, Table, by

ACTIVE, CLOSED = "active", "closed"


class PersonRow(NamedTuple):
    """A row of `people`. `version` is that of the person's own stream. `closed_at` is None while the status is active.

    `boxed_at` is None unless the person is in the archive.
    """

    tenant: Code
    person_id: Code
    name: str
    name_folded: Code
    registered_at: datetime
    open_account_count: Int32
    version: int
    status: Code
    closed_at: datetime | None
    boxed_at: datetime | None = None


people = Table(
    "people",
    PersonRow,
    keys=2,
    indexes=[by("name_folded"), by("registered_at"), by("status", "name_folded"), by("status", "registered_at")],
    filled=80,
)


class PersonTotalRow(NamedTuple):
    """A row of `person_totals`: what is on all of a person's accounts of one currency. May be beyond 64 bits."""

    tenant: Code
    person_id: Code
    currency: Code
    total_minor: BigNumber


person_totals = Table("person_totals", PersonTotalRow, keys=3, filled=60)


def fold_name(name: str) -> str:
    """The form in which names are compared and searched: without regard to case, accents and ways of writing a letter."""
    parts = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", storable(name)).casefold())
    return unicodedata.normalize("NFKC", "".join(each for each in parts if not unicodedata.combining(each)))


def registered(row: PersonRow | None, event: person_pb2.PersonRegistered, envelope: EventEnvelope) -> PersonRow:
    """A new person."""
    if row is not None:
        raise ValueError("this person is registered already")
    return PersonRow(
        tenant=envelope.tenant,
        person_id=event.person_id,
        name=storable(event.name),
        name_folded=fold_name(event.name),
        registered_at=recorded_at(envelope),
        open_account_count=0,
        version=envelope.version,
        status=ACTIVE,
        closed_at=None,
    )


def renamed(row: PersonRow | None, event: person_pb2.PersonRenamed, envelope: EventEnvelope) -> PersonRow:
    """Another name."""
    return existing(row)._replace(name=storable(event.name), name_folded=fold_name(event.name), version=envelope.version)


def account_attached(row: PersonRow | None, _: person_pb2.AccountAttached, envelope: EventEnvelope) -> PersonRow:
    """One account more."""
    person = existing(row)
    return person._replace(open_account_count=person.open_account_count + 1, version=envelope.version)


def account_detached(row: PersonRow | None, _: person_pb2.AccountDetached, envelope: EventEnvelope) -> PersonRow:
    """One account less."""
    person = existing(row)
    return person._replace(open_account_count=person.open_account_count - 1, version=envelope.version)


def closed(row: PersonRow | None, _: person_pb2.PersonClosed, envelope: EventEnvelope) -> PersonRow:
    """No customer any more, and all accounts are closed."""
    return existing(row)._replace(open_account_count=0, version=envelope.version, status=CLOSED, closed_at=recorded_at(envelope))


def marked(row: PersonRow | None, _: object, envelope: EventEnvelope) -> PersonRow:
    """Into the archive, or out of it."""
    return existing(row)._replace(version=envelope.version, boxed_at=boxed_at(envelope))


def account_opened(row: PersonTotalRow | None, event: account_pb2.AccountOpened, envelope: EventEnvelope) -> PersonTotalRow:
    """The first account of a currency begins its total at zero."""
    return row or PersonTotalRow(envelope.tenant, event.owner_id, event.currency, 0)


def deposited(row: PersonTotalRow | None, event: account_pb2.MoneyDeposited, envelope: EventEnvelope) -> PersonTotalRow:
    """More on the accounts of a currency."""
    total = existing(row).total_minor + event.amount_minor
    return PersonTotalRow(envelope.tenant, event.owner_id, event.currency, total)


def withdrawn(row: PersonTotalRow | None, event: account_pb2.MoneyWithdrawn, envelope: EventEnvelope) -> PersonTotalRow:
    """Less on the accounts of a currency."""
    total = existing(row).total_minor - event.amount_minor
    return PersonTotalRow(envelope.tenant, event.owner_id, event.currency, total)


PEOPLE = Projection(
    table=people,
    key=key_of("person", lambda event: event.person_id),
    on=[
        on(person_pb2.PersonRegistered, registered),
        on(person_pb2.PersonRenamed, renamed),
        on(person_pb2.AccountAttached, account_attached),
        on(person_pb2.AccountDetached, account_detached),
        on(person_pb2.PersonClosed, closed),
        *(on(mark, marked) for mark in MARKS),
    ],
    purges=[Purge("person", "person_id")],
)

PERSON_TOTALS = Projection(
    table=person_totals,
    key=lambda event, _: (event.owner_id, event.currency),
    on=[
        on(account_pb2.AccountOpened, account_opened),
        on(account_pb2.MoneyDeposited, deposited),
        on(account_pb2.MoneyWithdrawn, withdrawn),
    ],
    # An account is purged with its owner alone.
    purges=[Purge("person", "person_id")],
)


STATUSES = {person_query_pb2.PERSON_STATUS_ACTIVE: ACTIVE, person_query_pb2.PERSON_STATUS_CLOSED: CLOSED}
STATUS_OF = {text: status for status, text in STATUSES.items()}


class PersonSummaryRow(NamedTuple):
    """A person and what is on all of their accounts: amounts as decimal text, by currency."""

    person_id: str
    name: str
    name_folded: str
    registered_at: datetime
    open_account_count: int
    version: int
    status: str
    closed_at: datetime | None
    boxed_at: datetime | None
    currencies: list[str]
    totals: list[str]


def show(row: PersonSummaryRow, shown: person_query_pb2.PersonSummary) -> None:
    """A person as they are shown."""
    shown.person_id = row.person_id
    shown.name = row.name
    set_moment(shown.registered_at, row.registered_at)
    shown.open_account_count = row.open_account_count
    for currency, total in zip(row.currencies, row.totals, strict=True):
        shown.total_balances.add(currency=currency, total_minor=total)
    shown.version = row.version
    shown.status = STATUS_OF[row.status]
    set_moment(shown.closed_at, row.closed_at)
    set_moment(shown.boxed_at, row.boxed_at)


def with_totals(tables: Mapping[str, Sequence[Any]]) -> PersonSummaryRow | None:
    """The row that WITH_TOTALS makes of the rows of both tables."""
    person: PersonRow | None = next(iter(tables[people.name]), None)
    if person is None:
        return None
    totals: Sequence[PersonTotalRow] = tables[person_totals.name]
    shown = person._asdict()
    del shown["tenant"]
    return PersonSummaryRow(**shown, currencies=[row.currency for row in totals], totals=[str(row.total_minor) for row in totals])


WITH_TOTALS = """people p, LATERAL (
  SELECT coalesce(array_agg(currency ORDER BY currency), '{}') AS currencies,
         coalesce(array_agg(total_minor::text ORDER BY currency), '{}') AS totals
  FROM person_totals WHERE tenant = p.tenant AND person_id = p.person_id) t"""

PERSON = Summary(
    name="person",
    source=Source(row=PersonSummaryRow, sql=WITH_TOTALS, of_tables=with_totals),
    show=show,
    history=History(
        "person",
        names={person_pb2.AccountAttached: lambda event: (("account", event.account_id),)},
    ),
    orders={"name": "name_folded", "registered_at": "registered_at"},
    filters={
        "name_prefix": begins_with("name_folded", fold_name),
        "status": equals("status", STATUSES),
        "registered_at": moment_between("registered_at"),
    },
    only_in={"name_prefix": ["name"], "registered_at": ["registered_at"]},
)

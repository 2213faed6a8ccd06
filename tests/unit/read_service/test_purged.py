"""Summaries as of a time behind the purge of an aggregate, while some of its events are still there."""

from __future__ import annotations

from bank.v1 import account_pb2, transfer_pb2
from foldline.v1 import retention_pb2
from read_service.projections.people import PERSON
from read_service.projections.transfers import TRANSFER
from shared.projections.tables import Tables
from shared.projections.time_travel import Folded
from tests.support.fakes.line import Store, uid
from tests.support.fakes.tables import PERSON_TABLES, TRANSFER_TABLES


def test_a_purged_person_is_not_there() -> None:
    """Whatever is left of the events before the end."""
    store, folded = Store(), Folded(Tables(PERSON_TABLES), PERSON, uid(1))
    store.person("acme", uid(1), "Alice")
    store.account("acme", uid(2), uid(1))
    store.deposit("acme", uid(2), uid(1), 5, 5)
    assert [folded.add(event) for event in store.events] == [True] * 4
    assert folded.add(store.append("acme", uid(2), retention_pb2.AggregatePurged())) is False  # its owner's rows stay
    assert folded.row is not None
    assert folded.add(store.append("acme", uid(1), retention_pb2.AggregatePurged(), category="person")) is True
    assert folded.row is None


def test_a_transfer_loses_what_it_had_from_a_purged_account() -> None:
    """The moment of the debit."""
    store, folded = Store(), Folded(Tables(TRANSFER_TABLES), TRANSFER, uid(3))
    started = transfer_pb2.TransferStarted(transfer_id=uid(3), from_account_id=uid(1), to_account_id=uid(2), amount_minor=5)
    store.append("acme", uid(3), started, category="transfer")
    store.append("acme", uid(1), account_pb2.MoneyWithdrawn(account_id=uid(1), amount_minor=5, transfer_id=uid(3)))
    assert all(folded.add(event) for event in store.events)
    assert folded.row is not None
    assert folded.row.debited_at is not None
    assert folded.add(store.append("acme", uid(1), retention_pb2.AggregatePurged()))
    assert folded.row.debited_at is None

"""The query tables as the events mean them to be: a second implementation of their folds, on purpose."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from google.protobuf.message import Message

from bank.v1 import account_pb2, person_pb2, transfer_pb2, user_pb2
from foldline.v1 import archive_pb2, tenant_pb2
from foldline.v1.event_store_pb2 import EventEnvelope
from tests.support.checks.kinds import decoded

Row = dict[str, Any]

KEYS = {
    "people": ("tenant", "person_id"),
    "person_totals": ("tenant", "person_id", "currency"),
    "accounts": ("tenant", "account_id"),
    "movements": ("tenant", "account_id", "version"),
    "transfers": ("tenant", "transfer_id"),
    "users": ("tenant", "user_id"),
}


class Fold:
    """The query tables as the events mean them to be; without the columns that only help to search."""

    def __init__(self) -> None:
        self.tables: dict[str, dict[tuple[Any, ...], Row]] = {name: {} for name in KEYS}

    def read(self, envelope: EventEnvelope) -> None:
        """One event."""
        event = decoded(envelope)
        if isinstance(event, tenant_pb2.TenantClosed):
            for rows in self.tables.values():
                for key in [key for key in rows if key[0] == envelope.tenant]:
                    del rows[key]
            return
        if isinstance(event, tenant_pb2.EventPurged):
            return
        match envelope.aggregate_type:
            case "person":
                self._person(envelope, event)
            case "account":
                self._account(envelope, event)
            case "transfer":
                self._transfer(envelope, event)
            case "user":
                self._user(envelope, event)
            case "suspense":
                assert isinstance(event, account_pb2.MoneySuspended)
                self._step(envelope, event.transfer_id, "suspended_at")
            case other:
                assert other in ("login", "overrides", "retention"), other

    def _person(self, envelope: EventEnvelope, event: Message) -> None:
        new = {"open_account_count": 0, "status": "active", "closed_at": None, "boxed_at": None}
        person = self.tables["people"].setdefault((envelope.tenant, envelope.aggregate_id), new)
        match event:
            case person_pb2.PersonRegistered() | person_pb2.PersonRenamed():
                person["name"] = _shown(event.name)
            case person_pb2.AccountAttached():
                person["open_account_count"] += 1
            case person_pb2.AccountDetached():
                person["open_account_count"] -= 1
            case person_pb2.PersonClosed():
                person["open_account_count"] -= len(event.account_ids)
                person |= {"status": "closed", "closed_at": _moment(envelope)}
            case archive_pb2.AggregateBoxed():
                person["boxed_at"] = _moment(envelope)
            case archive_pb2.AggregateUnboxed():
                person["boxed_at"] = None
        person["version"] = envelope.version

    def _account(self, envelope: EventEnvelope, event: Message) -> None:
        tenant, accounts, totals = envelope.tenant, self.tables["accounts"], self.tables["person_totals"]
        match event:
            case account_pb2.AccountOpened():
                accounts[tenant, event.account_id] = {
                    "owner_id": event.owner_id,
                    "name": _shown(event.name),
                    "currency": event.currency,
                    "balance_minor": 0,
                    "status": "active",
                    "boxed_at": None,
                }
                totals.setdefault((tenant, event.owner_id, event.currency), {"total_minor": 0})
            case account_pb2.MoneyDeposited() | account_pb2.MoneyWithdrawn():
                came_in = isinstance(event, account_pb2.MoneyDeposited)
                amount = event.amount_minor if came_in else -event.amount_minor
                account = accounts[tenant, event.account_id]
                account["balance_minor"] += amount
                totals[tenant, account["owner_id"], account["currency"]]["total_minor"] += amount
                self.tables["movements"][tenant, event.account_id, envelope.version] = {
                    "amount_minor": amount,
                    "balance_after_minor": account["balance_minor"],
                    "transfer_id": event.transfer_id,
                    "counterparty_account_id": event.counterparty_account_id,
                }
                if event.transfer_id:
                    source = self.tables["transfers"][tenant, event.transfer_id]["from_account_id"]
                    back = "refunded_at" if event.account_id == source else "credited_at"
                    self._step(envelope, event.transfer_id, back if came_in else "debited_at")
            case account_pb2.AccountFrozen():
                accounts[tenant, event.account_id]["status"] = "frozen"
            case account_pb2.AccountUnfrozen():
                accounts[tenant, event.account_id]["status"] = "active"
            case account_pb2.AccountClosed():
                accounts[tenant, event.account_id]["status"] = "closed"
            case archive_pb2.AggregateBoxed():
                accounts[tenant, envelope.aggregate_id]["boxed_at"] = _moment(envelope)
            case archive_pb2.AggregateUnboxed():
                accounts[tenant, envelope.aggregate_id]["boxed_at"] = None
        accounts[tenant, envelope.aggregate_id]["version"] = envelope.version

    def _transfer(self, envelope: EventEnvelope, event: Message) -> None:
        match event:
            case transfer_pb2.TransferStarted():
                self.tables["transfers"][envelope.tenant, event.transfer_id] = {
                    "from_account_id": event.from_account_id,
                    "to_account_id": event.to_account_id,
                    "amount_minor": event.amount_minor,
                    "currency": event.currency,
                    "status": "started",
                    "reason": "",
                    "compensation": 0,
                    "started_at": _moment(envelope),
                    **dict.fromkeys(("debited_at", "credited_at", "refunded_at", "suspended_at", "ended_at")),
                }
            case transfer_pb2.TransferCompleted():
                self._step(envelope, event.transfer_id, "ended_at", status="completed")
            case transfer_pb2.TransferFailed():
                more = {"status": "failed", "reason": event.reason, "compensation": event.compensation}
                self._step(envelope, event.transfer_id, "ended_at", **more)

    def _step(self, envelope: EventEnvelope, transfer_id: str, name: str, **more: Any) -> None:
        self.tables["transfers"][envelope.tenant, transfer_id].update({name: _moment(envelope), **more})

    def _user(self, envelope: EventEnvelope, event: Message) -> None:
        user = self.tables["users"].setdefault((envelope.tenant, envelope.aggregate_id), {})
        match event:
            case user_pb2.UserRegistrationStarted():
                user.update(login=event.login, email=event.email, status="started", reason="")
                user.update(started_at=_moment(envelope), ended_at=None, roles="user", deactivated_at=None)
            case user_pb2.UserRegistrationSucceeded():
                user.update(status="succeeded", ended_at=_moment(envelope))
            case user_pb2.UserRegistrationFailed():
                user.update(status="failed", reason=event.reason, ended_at=_moment(envelope))
            case user_pb2.UserEmailChanged():
                user.update(email=event.email)
            case user_pb2.UserRolesChanged():
                user.update(roles=",".join(event.roles))
            case user_pb2.UserDeactivated():
                user.update(deactivated_at=_moment(envelope))


def fold(line: Iterable[EventEnvelope]) -> Mapping[str, dict[tuple[Any, ...], Row]]:
    """The query tables after these events."""
    tables = Fold()
    for envelope in line:
        tables.read(envelope)
    return tables.tables


def _moment(envelope: EventEnvelope) -> datetime:
    return envelope.recorded_at.ToDatetime(tzinfo=UTC)


def _shown(text: str) -> str:
    """The text without characters that PostgreSQL cannot store."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")

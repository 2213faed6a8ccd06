"""An account and the money on it, in whole minor units of one currency."""

from __future__ import annotations

from typing import assert_never

from msgspec import Struct
from msgspec.structs import replace

from shared.folds.aggregate import Aggregate, Meta
from shared.folds.errors import AlreadyExists, NotFound, Rejected
from write_service.domain.account_types import (
    AccountClosed,
    AccountEvent,
    AccountFrozen,
    AccountOpened,
    AccountUnfrozen,
    CloseAccount,
    DepositMoney,
    FreezeAccount,
    MoneyDeposited,
    MoneyWithdrawn,
    OpenAccount,
    UnfreezeAccount,
    WithdrawMoney,
)
from write_service.domain.person_types import PersonClosed
from write_service.domain.transfer_types import TransferStarted

BALANCE_MINOR_MAX = 2**63 - 1
"""What the 64 bits of an amount hold."""


# State


class Account(Struct, frozen=True, kw_only=True):
    opened: bool = False
    owner_id: str = ""
    currency: str = ""
    balance_minor: int = 0
    frozen: bool = False
    closed: bool = False


# Decisions


def open_account(account: Account, command: OpenAccount, meta: Meta) -> list[AccountEvent]:
    """Refusals: ACCOUNT_ALREADY_OPEN; then those of attaching it to its owner."""
    if account.opened:
        raise AlreadyExists("ACCOUNT_ALREADY_OPEN", "an account with this id is open")
    return [AccountOpened(account_id=command.account_id, owner_id=command.owner_id, currency=command.currency, name=command.name)]


def deposit(account: Account, command: DepositMoney, meta: Meta) -> list[AccountEvent]:
    """Refusals, in order of precedence.

    ONLY_A_PROCESS, COMMAND_EXPIRED, ACCOUNT_NOT_FOUND, ACCOUNT_CLOSED, ACCOUNT_FROZEN, CURRENCY_MISMATCH, BALANCE_OVERFLOW.
    """
    _refuse_unless_timely_and_allowed(command, meta)
    _refuse_unless_money_can_move(account, command.currency)
    balance_minor = account.balance_minor + command.amount_minor
    if balance_minor > BALANCE_MINOR_MAX:
        raise Rejected("BALANCE_OVERFLOW", "the balance would be beyond what 64 bits hold")
    return [
        MoneyDeposited(
            account_id=command.account_id,
            owner_id=account.owner_id,
            amount_minor=command.amount_minor,
            currency=account.currency,
            balance_after_minor=balance_minor,
            transfer_id=command.transfer_id,
            counterparty_account_id=command.counterparty_account_id,
        )
    ]


def withdraw(account: Account, command: WithdrawMoney, meta: Meta) -> list[AccountEvent]:
    """Refusals, in order of precedence.

    ONLY_A_PROCESS, COMMAND_EXPIRED, ACCOUNT_NOT_FOUND, ACCOUNT_CLOSED, ACCOUNT_FROZEN, CURRENCY_MISMATCH,
    INSUFFICIENT_FUNDS.
    """
    _refuse_unless_timely_and_allowed(command, meta)
    _refuse_unless_money_can_move(account, command.currency)
    balance_minor = account.balance_minor - command.amount_minor
    if balance_minor < 0:
        raise Rejected("INSUFFICIENT_FUNDS", "the balance is lower than the amount", balance_minor=account.balance_minor)
    return [
        MoneyWithdrawn(
            account_id=command.account_id,
            owner_id=account.owner_id,
            amount_minor=command.amount_minor,
            currency=account.currency,
            balance_after_minor=balance_minor,
            transfer_id=command.transfer_id,
            counterparty_account_id=command.counterparty_account_id,
        )
    ]


def freeze(account: Account, command: FreezeAccount, meta: Meta) -> list[AccountEvent]:
    """Refusals: ACCOUNT_NOT_FOUND."""
    _refuse_unless_open(account)
    return [] if account.frozen else [AccountFrozen(account_id=command.account_id, owner_id=account.owner_id)]


def unfreeze(account: Account, command: UnfreezeAccount, meta: Meta) -> list[AccountEvent]:
    """Refusals: ACCOUNT_NOT_FOUND."""
    _refuse_unless_open(account)
    return [AccountUnfrozen(account_id=command.account_id, owner_id=account.owner_id)] if account.frozen else []


def close(account: Account, command: CloseAccount, meta: Meta) -> list[AccountEvent]:
    """Refusals: ACCOUNT_NOT_FOUND, ACCOUNT_NOT_EMPTY."""
    _refuse_unless_open(account)
    if account.closed:
        return []
    if account.balance_minor:
        raise Rejected("ACCOUNT_NOT_EMPTY", "the account holds money", balance_minor=account.balance_minor)
    return [AccountClosed(account_id=command.account_id, owner_id=account.owner_id)]


def close_with_owner(account: Account, event: PersonClosed, meta: Meta) -> list[AccountEvent]:
    """Follows the closing of the account's owner, in its transaction. Refusals: PERSON_HOLDS_MONEY."""
    if account.closed:
        return []
    if account.balance_minor:
        raise Rejected("PERSON_HOLDS_MONEY", "an account of the person holds money", account_id=meta.aggregate_id)
    return [AccountClosed(account_id=meta.aggregate_id, owner_id=account.owner_id)]


def end_of_transfer(account: Account, event: TransferStarted, meta: Meta) -> list[AccountEvent]:
    """Whether an account can be an end of the transfer, in the transaction that starts it.

    The rest is decided when the money moves. Refusals: ACCOUNT_NOT_FOUND, CURRENCY_MISMATCH.
    """
    _refuse_unless_open(account)
    _refuse_unless_currency(account, event.currency)
    return []


def _refuse_unless_timely_and_allowed(command: DepositMoney | WithdrawMoney, meta: Meta) -> None:
    """What only a process may ask for, and only for so long.

    An expired command is refused here, by the clock of the batch that decides it, so that its sender, once refused, knows
    that it did not and will not happen.
    """
    if (command.transfer_id or command.counterparty_account_id or command.not_after_ms) and "process" not in meta.roles:
        raise Rejected("ONLY_A_PROCESS", "only a process may move money for a transfer")
    if command.not_after_ms is not None and meta.now.timestamp() * 1000 > command.not_after_ms:
        raise Rejected("COMMAND_EXPIRED", "the command came too late")


def _refuse_unless_open(account: Account) -> None:
    if not account.opened:
        raise NotFound("ACCOUNT_NOT_FOUND", "there is no account with this id")


def _refuse_unless_money_can_move(account: Account, currency: str) -> None:
    _refuse_unless_open(account)
    if account.closed:
        raise Rejected("ACCOUNT_CLOSED", "the account is closed")
    if account.frozen:
        raise Rejected("ACCOUNT_FROZEN", "the account is frozen")
    _refuse_unless_currency(account, currency)


def _refuse_unless_currency(account: Account, currency: str) -> None:
    if currency != account.currency:
        raise Rejected("CURRENCY_MISMATCH", f"the account is in {account.currency}", currency=account.currency)


# Evolve


def evolve(account: Account, event: AccountEvent) -> Account:
    """The account after the event."""
    match event:
        case AccountOpened():
            return replace(account, opened=True, owner_id=event.owner_id, currency=event.currency)
        case MoneyDeposited() | MoneyWithdrawn():
            return replace(account, balance_minor=event.balance_after_minor)
        case AccountFrozen():
            return replace(account, frozen=True)
        case AccountUnfrozen():
            return replace(account, frozen=False)
        case AccountClosed():
            return replace(account, closed=True)
        case _:
            assert_never(event)


ACCOUNT = Aggregate(category="account", initial=Account(), evolve=evolve)

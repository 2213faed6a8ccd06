"""What may be done with an account and its money."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from msgspec.structs import replace

from tests.support.checks.scenario import META, given
from write_service.domain.account import (
    ACCOUNT,
    BALANCE_MINOR_MAX,
    Account,
    close,
    close_with_owner,
    deposit,
    end_of_transfer,
    freeze,
    open_account,
    unfreeze,
    withdraw,
)
from write_service.domain.account_types import (
    AccountClosed,
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

BIGGEST = 9_223_372_036_854_775_807

opened = AccountOpened(account_id="a1", owner_id="p1", currency="USD", name="blue")
closed = AccountClosed(account_id="a1", owner_id="p1")
frozen = AccountFrozen(account_id="a1", owner_id="p1")
unfrozen = AccountUnfrozen(account_id="a1", owner_id="p1")
open_it = OpenAccount(account_id="a1", owner_id="p1", currency="USD", name="blue")
owner_closed = PersonClosed(person_id="p1", account_ids=("a1", "a2"))
close_it = CloseAccount(account_id="a1")
freeze_it = FreezeAccount(account_id="a1")
unfreeze_it = UnfreezeAccount(account_id="a1")


def deposited(amount: int, after: int, transfer: str | None = None, other: str | None = None) -> MoneyDeposited:
    """Dollars came in."""
    return MoneyDeposited(
        account_id="a1",
        owner_id="p1",
        amount_minor=amount,
        currency="USD",
        balance_after_minor=after,
        transfer_id=transfer,
        counterparty_account_id=other,
    )


def withdrawn(amount: int, after: int, transfer: str | None = None, other: str | None = None) -> MoneyWithdrawn:
    """Dollars went out."""
    return MoneyWithdrawn(
        account_id="a1",
        owner_id="p1",
        amount_minor=amount,
        currency="USD",
        balance_after_minor=after,
        transfer_id=transfer,
        counterparty_account_id=other,
    )


def deposit_of(
    amount: int, currency: str = "USD", transfer: str | None = None, other: str | None = None, not_after_ms: int | None = None
) -> DepositMoney:
    """The wish to bring some."""
    return DepositMoney(
        account_id="a1",
        amount_minor=amount,
        currency=currency,
        transfer_id=transfer,
        counterparty_account_id=other,
        not_after_ms=not_after_ms,
    )


def withdrawal_of(
    amount: int, currency: str = "USD", transfer: str | None = None, other: str | None = None, not_after_ms: int | None = None
) -> WithdrawMoney:
    """The wish to take some."""
    return WithdrawMoney(
        account_id="a1",
        amount_minor=amount,
        currency=currency,
        transfer_id=transfer,
        counterparty_account_id=other,
        not_after_ms=not_after_ms,
    )


# (what happened, decision, command, the events it gives)
ACCEPTED: dict[str, tuple[list[Any], Any, Any, list[Any]]] = {
    "open": ([], open_account, open_it, [opened]),
    "first deposit": ([opened], deposit, deposit_of(100), [deposited(100, 100)]),
    "second deposit": ([opened, deposited(100, 100)], deposit, deposit_of(31), [deposited(31, 131)]),
    "deposit up to the very limit": (
        [opened, deposited(BIGGEST - 1, BIGGEST - 1)], deposit, deposit_of(1), [deposited(1, BIGGEST)],
    ),
    "withdraw": ([opened, deposited(100, 100)], withdraw, withdrawal_of(69), [withdrawn(69, 31)]),
    "withdraw all": ([opened, deposited(100, 100)], withdraw, withdrawal_of(100), [withdrawn(100, 0)]),
    "withdraw the most there can be": (
        [opened, deposited(BIGGEST, BIGGEST)], withdraw, withdrawal_of(BIGGEST), [withdrawn(BIGGEST, 0)],
    ),
    "deposit after thawing": ([opened, frozen, unfrozen], deposit, deposit_of(5), [deposited(5, 5)]),
    "freeze": ([opened], freeze, freeze_it, [frozen]),
    "freeze again after thawing": ([opened, frozen, unfrozen], freeze, freeze_it, [frozen]),
    "unfreeze": ([opened, frozen], unfreeze, unfreeze_it, [unfrozen]),
    "freeze the frozen: nothing": ([opened, frozen], freeze, freeze_it, []),
    "unfreeze the free: nothing": ([opened], unfreeze, unfreeze_it, []),
    "unfreeze twice: nothing": ([opened, frozen, unfrozen], unfreeze, unfreeze_it, []),
    "close": ([opened], close, close_it, [closed]),
    "close the emptied": ([opened, deposited(100, 100), withdrawn(100, 0)], close, close_it, [closed]),
    "close the frozen": ([opened, frozen], close, close_it, [closed]),
    "close the closed: nothing": ([opened, closed], close, close_it, []),
}  # fmt: skip


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str) -> None:
    """These commands give exactly these events, or none where nothing changes."""
    history, decide, command, events = ACCEPTED[name]
    given(ACCOUNT, *history).when(decide, command).then(*events)


def start_of(currency: str = "USD") -> TransferStarted:
    """A transfer begins, of which the account is an end."""
    return TransferStarted(
        transfer_id="t1",
        from_account_id="a1",
        to_account_id="a2",
        amount_minor=69,
        currency=currency,
        debit_command_id="",
        credit_command_id="",
        refund_command_id="",
        suspend_command_id="",
        complete_command_id="",
        fail_command_id="",
        suspense_id="s1",
        debit_not_after_ms=1,
        credit_not_after_ms=2,
    )


full = [opened, deposited(BIGGEST, BIGGEST)]

# (what happened, decision, command, reason, facts). Each history breaks the rule of its row and all rules after it, as far
# as they can be broken together: so the table shows the order of precedence that the docstrings promise.
REFUSED: dict[str, tuple[list[Any], Any, Any, str, dict[str, str]]] = {
    "open: open already": ([opened], open_account, open_it, "ACCOUNT_ALREADY_OPEN", {}),
    "open: open already, frozen, for another owner": (
        [opened, frozen],
        open_account,
        OpenAccount(account_id="a1", owner_id="p2", currency="EUR", name="red"),
        "ACCOUNT_ALREADY_OPEN",
        {},
    ),
    "deposit: 1. by a user, for a transfer": ([], deposit, deposit_of(BIGGEST, "EUR", "t1", "a2", 1), "ONLY_A_PROCESS", {}),
    "deposit: 1. by a user, with a transfer alone": ([opened], deposit, deposit_of(1, transfer="t1"), "ONLY_A_PROCESS", {}),
    "deposit: 1. by a user, with another account alone": ([opened], deposit, deposit_of(1, other="a2"), "ONLY_A_PROCESS", {}),
    "deposit: 1. by a user, with a time limit alone": ([opened], deposit, deposit_of(1, not_after_ms=9), "ONLY_A_PROCESS", {}),
    "deposit: 3. no such account": ([], deposit, deposit_of(BIGGEST, "EUR"), "ACCOUNT_NOT_FOUND", {}),
    "deposit: 4. closed": ([*full, frozen, closed], deposit, deposit_of(BIGGEST, "EUR"), "ACCOUNT_CLOSED", {}),
    "deposit: 5. frozen": ([*full, frozen], deposit, deposit_of(BIGGEST, "EUR"), "ACCOUNT_FROZEN", {}),
    "deposit: 6. another currency": (full, deposit, deposit_of(BIGGEST, "EUR"), "CURRENCY_MISMATCH", {"currency": "USD"}),
    "deposit: 7. beyond 64 bits": (full, deposit, deposit_of(BIGGEST), "BALANCE_OVERFLOW", {}),
    "deposit: 7. beyond 64 bits by one": (full, deposit, deposit_of(1), "BALANCE_OVERFLOW", {}),
    "withdraw: 1. by a user, for a transfer": ([], withdraw, withdrawal_of(1, "EUR", "t1", "a2", 1), "ONLY_A_PROCESS", {}),
    "withdraw: 3. no such account": ([], withdraw, withdrawal_of(1, "EUR"), "ACCOUNT_NOT_FOUND", {}),
    "withdraw: 4. closed": ([opened, frozen, closed], withdraw, withdrawal_of(1, "EUR"), "ACCOUNT_CLOSED", {}),
    "withdraw: 5. frozen": ([opened, frozen], withdraw, withdrawal_of(1, "EUR"), "ACCOUNT_FROZEN", {}),
    "withdraw: 6. another currency": ([opened], withdraw, withdrawal_of(1, "EUR"), "CURRENCY_MISMATCH", {"currency": "USD"}),
    "withdraw: 7. more than there is": (
        [opened, deposited(100, 100)], withdraw, withdrawal_of(101), "INSUFFICIENT_FUNDS", {"balance_minor": "100"},
    ),
    "withdraw: 7. from nothing": ([opened], withdraw, withdrawal_of(1), "INSUFFICIENT_FUNDS", {"balance_minor": "0"}),
    "freeze: no such account": ([], freeze, freeze_it, "ACCOUNT_NOT_FOUND", {}),
    "unfreeze: no such account": ([], unfreeze, unfreeze_it, "ACCOUNT_NOT_FOUND", {}),
    "close: 1. no such account": ([], close, close_it, "ACCOUNT_NOT_FOUND", {}),
    "close: 2. money on it": (
        [opened, deposited(100, 100), frozen], close, close_it, "ACCOUNT_NOT_EMPTY", {"balance_minor": "100"},
    ),
    "end of a transfer: 1. no such account": ([], end_of_transfer, start_of("EUR"), "ACCOUNT_NOT_FOUND", {}),
    "end of a transfer: 2. another currency": (
        [opened], end_of_transfer, start_of("EUR"), "CURRENCY_MISMATCH", {"currency": "USD"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    """These commands are refused for these reasons, in the documented order of precedence."""
    history, decide, command, reason, facts = REFUSED[name]
    given(ACCOUNT, *history).when(decide, command).then_refused(reason, **facts)


# A process may say more than a user, and its command may come too late. (what happened, decision, command, reason)
NOW_MS = int(META.now.timestamp() * 1000)
PROCESS = replace(META, roles=frozenset({"process"}))
TOO_LATE: dict[str, tuple[list[Any], Any, Any, str]] = {
    "deposit: 2. expired": ([], deposit, deposit_of(1, "EUR", "t1", "a2", NOW_MS - 1), "COMMAND_EXPIRED"),
    "withdraw: 2. expired": ([], withdraw, withdrawal_of(1, "EUR", "t1", "a2", NOW_MS - 1), "COMMAND_EXPIRED"),
}


@pytest.mark.parametrize("name", TOO_LATE)
def test_too_late(name: str) -> None:
    """Before anything else is looked at: whoever asked knows that it did not and will not happen."""
    history, decide, command, reason = TOO_LATE[name]
    given(ACCOUNT, *history).when(decide, command, PROCESS).then_refused(reason)


def test_a_process_moves_money_for_a_transfer_up_to_the_last_millisecond() -> None:
    """The events name the transfer and the other end."""
    account = given(ACCOUNT, opened, deposited(100, 100))
    account.when(deposit, deposit_of(5, "USD", "t1", "a2", NOW_MS), PROCESS).then(deposited(5, 105, "t1", "a2"))
    account.when(withdraw, withdrawal_of(5, "USD", "t1", "a2", NOW_MS), PROCESS).then(withdrawn(5, 95, "t1", "a2"))
    a_moment_later = replace(PROCESS, now=META.now + timedelta(milliseconds=1))
    account.when(withdraw, withdrawal_of(5, "USD", "t1", "a2", NOW_MS), a_moment_later).then_refused("COMMAND_EXPIRED")


def test_a_process_needs_no_time_limit() -> None:
    """A refund is never too late."""
    given(ACCOUNT, opened).when(deposit, deposit_of(5, "USD", "t1", "a2"), PROCESS).then(deposited(5, 5, "t1", "a2"))


A1 = replace(META, aggregate_id="a1")


@pytest.mark.parametrize("history", [[opened], [opened, frozen]], ids=["active", "frozen"])
def test_an_empty_account_is_closed_with_its_owner(history: list[Any]) -> None:
    """Of the accounts that the event names it closes itself; closed already, it has nothing to do."""
    given(ACCOUNT, *history).when(close_with_owner, owner_closed, A1).then(closed)
    given(ACCOUNT, *history, closed).when(close_with_owner, owner_closed, A1).then()


def test_an_account_that_holds_money_keeps_its_owner() -> None:
    """The refusal names the account, so that the caller knows where to look."""
    account = given(ACCOUNT, opened, deposited(1, 1), frozen)
    account.when(close_with_owner, owner_closed, A1).then_refused("PERSON_HOLDS_MONEY", account_id="a1")


@pytest.mark.parametrize("history", [[opened], [opened, frozen], [opened, closed]], ids=["open", "frozen", "closed"])
def test_any_account_of_the_currency_can_be_an_end_of_a_transfer(history: list[Any]) -> None:
    """Whether money can move is decided when it moves."""
    given(ACCOUNT, *history).when(end_of_transfer, start_of()).then()


@pytest.mark.parametrize("decide", [open_account, deposit, withdraw, freeze, unfreeze, close, end_of_transfer])
def test_every_documented_refusal_has_a_row(decide: Any) -> None:
    """A refusal that a docstring names is tried here, in the order in which it is named."""
    text = decide.__doc__.partition("Refusals")[2]
    named = [word.strip(":;,.") for word in text.split() if word.strip(":;,.").isupper()]
    tried = {name: reason for table in (REFUSED, TOO_LATE) for name, (_, it, _, reason, *_) in table.items() if it is decide}
    assert list(dict.fromkeys(reason for _, reason in sorted(tried.items()))) == named


def test_the_limit_is_what_64_bits_hold() -> None:
    """An amount travels as int64."""
    assert BALANCE_MINOR_MAX == BIGGEST


def test_the_state_is_the_fold_of_the_events() -> None:
    """Every event of the kind leaves its trace."""
    account = given(ACCOUNT, opened, deposited(100, 100), withdrawn(69, 31), frozen).state
    assert account == Account(opened=True, owner_id="p1", currency="USD", balance_minor=31, frozen=True)
    assert not given(ACCOUNT, opened, frozen, unfrozen).state.frozen
    assert given(ACCOUNT, opened, closed).state == Account(opened=True, owner_id="p1", currency="USD", closed=True)

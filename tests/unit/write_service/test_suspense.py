"""Money that waits for an operator."""

from __future__ import annotations

import pytest

from tests.support.checks.scenario import given
from write_service.domain.suspense import SUSPENSE, Suspense, suspend
from write_service.domain.suspense_types import MoneySuspended, SuspendMoney


def suspended(transfer_id: str, amount: int, balance_after: int, wraps: int = 0) -> MoneySuspended:
    """The event of money in US dollars that waits."""
    return MoneySuspended(
        suspense_id="s1",
        transfer_id=transfer_id,
        amount_minor=amount,
        currency="USD",
        balance_after_minor=balance_after,
        balance_after_wraps=wraps,
    )


first, second = suspended("t1", 69, 69), suspended("t2", 31, 100)
most = suspended("t1", 2**63 - 1, 2**63 - 1)


def test_money_comes_to_wait() -> None:
    """The event names the transfer and what is there now."""
    command = SuspendMoney(suspense_id="s1", transfer_id="t1", amount_minor=69, currency="USD")
    given(SUSPENSE).when(suspend, command).then(first)


def test_more_money_comes_to_wait() -> None:
    """The balance adds up."""
    command = SuspendMoney(suspense_id="s1", transfer_id="t2", amount_minor=31, currency="USD")
    given(SUSPENSE, first).when(suspend, command).then(second)


@pytest.mark.parametrize(
    ("amount", "balance", "wraps"), [(1, 0, 1), (100, 99, 1), (2**63 - 1, 2**63 - 2, 1)], ids=["one", "more", "the most"]
)
def test_a_balance_beyond_64_bits_refuses_nothing(amount: int, balance: int, wraps: int) -> None:
    """Else a transfer that can go nowhere would wait for ever, and all that come after it. The balance stays exact."""
    command = SuspendMoney(suspense_id="s1", transfer_id="t2", amount_minor=amount, currency="USD")
    after = suspended("t2", amount, balance, wraps)
    given(SUSPENSE, most).when(suspend, command).then(after)
    assert given(SUSPENSE, most, after).state == Suspense(balance_minor=balance, wraps=wraps)


def test_the_state_is_the_fold_of_the_events() -> None:
    """What the last event says."""
    assert given(SUSPENSE, first, second).state == Suspense(balance_minor=100)

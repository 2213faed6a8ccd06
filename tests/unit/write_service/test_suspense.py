"""Money that waits for an operator."""

from __future__ import annotations

from tests.support.checks.scenario import given
from write_service.domain.suspense import SUSPENSE, Suspense, suspend
from write_service.domain.suspense_types import MoneySuspended, SuspendMoney

first = MoneySuspended(suspense_id="s1", transfer_id="t1", amount_minor=69, currency="USD", balance_after_minor=69)
second = MoneySuspended(suspense_id="s1", transfer_id="t2", amount_minor=31, currency="USD", balance_after_minor=100)


def test_money_comes_to_wait() -> None:
    """The event names the transfer and what is there now."""
    command = SuspendMoney(suspense_id="s1", transfer_id="t1", amount_minor=69, currency="USD")
    given(SUSPENSE).when(suspend, command).then(first)


def test_more_money_comes_to_wait() -> None:
    """The balance adds up."""
    command = SuspendMoney(suspense_id="s1", transfer_id="t2", amount_minor=31, currency="USD")
    given(SUSPENSE, first).when(suspend, command).then(second)


def test_the_state_is_the_fold_of_the_events() -> None:
    """What the last event says."""
    assert given(SUSPENSE, first, second).state == Suspense(balance_minor=100)

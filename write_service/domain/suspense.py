"""A tenant's suspense account of one currency: money that could neither be credited nor given back waits on it."""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import replace

from shared.folds.aggregate import Aggregate, Meta
from write_service.domain.suspense_types import MoneySuspended, SuspendMoney, SuspenseEvent

# State


WRAP = 2**63
"""The balance has no limit, since nothing may be refused here; a field of an event holds less than this."""


class Suspense(Struct, frozen=True, kw_only=True):
    """The balance is balance_minor + wraps * WRAP."""

    balance_minor: int = 0
    wraps: int = 0


# Decisions


def suspend(suspense: Suspense, command: SuspendMoney, meta: Meta) -> list[SuspenseEvent]:
    """Never refused: money that is here has nowhere else to go. The command's id keeps it from coming twice."""
    more, balance_minor = divmod(suspense.balance_minor + command.amount_minor, WRAP)
    return [
        MoneySuspended(
            suspense_id=command.suspense_id,
            transfer_id=command.transfer_id,
            amount_minor=command.amount_minor,
            currency=command.currency,
            balance_after_minor=balance_minor,
            balance_after_wraps=suspense.wraps + more,
        )
    ]


# Evolve


def evolve(suspense: Suspense, event: SuspenseEvent) -> Suspense:
    """The suspense account after the event."""
    return replace(suspense, balance_minor=event.balance_after_minor, wraps=event.balance_after_wraps)


SUSPENSE = Aggregate(category="suspense", initial=Suspense(), evolve=evolve)

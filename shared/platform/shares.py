"""A limited number of things that tenants hold: shares, not counts.

One tenant alone may hold all; of two that both want all, each holds half. When all are held, a tenant that has less than its
share may have one all the same: the tenant with most gives one up.
"""

from __future__ import annotations

from typing import Generic, TypeVar

HeldT = TypeVar("HeldT")


class Shares(Generic[HeldT]):
    """What is held, by tenant, in the order in which it was taken."""

    def __init__(self, total: int) -> None:
        """`total`: how many things there are."""
        self._total = total
        self._held = 0
        self._by_tenant: dict[str, dict[HeldT, None]] = {}

    def __len__(self) -> int:
        return self._held

    @property
    def full(self) -> bool:
        """Whether nothing is left."""
        return self._held >= self._total

    def may_have(self, tenant: str) -> bool:
        """Whether the tenant may have one more: something is left, or it holds less than its share."""
        if not self.full:
            return True
        tenants = len(self._by_tenant) + (tenant not in self._by_tenant)
        return len(self._by_tenant.get(tenant, ())) < max(self._total // tenants, 1)

    def most(self) -> tuple[str, dict[HeldT, None]]:
        """The tenant that holds most, and what it holds. Raises ValueError if nothing is held."""
        return max(self._by_tenant.items(), key=lambda each: len(each[1]))

    def take(self, tenant: str, held: HeldT) -> None:
        """Notes that the tenant holds it."""
        self._by_tenant.setdefault(tenant, {})[held] = None
        self._held += 1

    def give_back(self, tenant: str, held: HeldT) -> None:
        """Notes that the tenant does not hold it, if it did."""
        of_tenant = self._by_tenant.get(tenant, {})
        if held in of_tenant:
            del of_tenant[held]
            self._held -= 1
            if not of_tenant:
                del self._by_tenant[tenant]

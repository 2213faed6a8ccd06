"""Counts the tries of passwords, within this process."""

from __future__ import annotations

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter


class Tries:
    """Counts tries within the last minute, for each login and for each tenant."""

    def __init__(self, *, per_login: int, per_tenant: int) -> None:
        """The arguments are the most tries that are allowed in a minute."""
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._per_login = RateLimitItemPerMinute(per_login, namespace="login")
        self._per_tenant = RateLimitItemPerMinute(per_tenant, namespace="tenant")

    def count(self, tenant: str, held: str) -> bool:
        """Counts a try of a tenant's login; false if there were too many before."""
        return self._limiter.hit(self._per_login, tenant, held) and self._limiter.hit(self._per_tenant, tenant)

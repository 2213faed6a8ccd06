"""Counts wrong passwords in the write database, where all replicas see them."""

from __future__ import annotations

from shared.platform.postgres import Reads

PER_LOGIN_A_MINUTE = 10
PER_TENANT_A_MINUTE = 600


class Tries:
    """Counts tries within the last minute, for each login and for each tenant; a right password is none.

    Each is counted before the password is checked, so that many at once are not let through together. Killed in between: one
    try too many is counted for a minute.
    """

    def __init__(self, database: Reads, *, per_login: int = PER_LOGIN_A_MINUTE, per_tenant: int = PER_TENANT_A_MINUTE) -> None:
        """The limits are the most tries that are allowed in a minute."""
        self._database = database
        self._limits = (per_login, per_tenant)

    async def count(self, tenant: str, login_id: str) -> bool:
        """Counts a try of a tenant's login; false, and not counted, if there were too many before."""
        async with self._database.connection() as connection:
            cursor = await connection.execute(
                "SELECT count_password_try(%s, %s, %s::integer, %s::integer)", (tenant, login_id, *self._limits)
            )
            [(allowed,)] = await cursor.fetchall()
        return bool(allowed)

    async def forget(self, tenant: str, login_id: str) -> None:
        """The login's tries are none, and the tenant's one less: the password was right."""
        async with self._database.connection() as connection:
            await connection.execute("SELECT forget_password_tries(%s, %s)", (tenant, login_id))

"""Passwords: makes and checks argon2id hashes in two threads.

A hash takes tens of milliseconds of a core and 19 MiB, on purpose. So it is never made on the event loop, the number of hashes at
once is limited, and tenants take turns.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from msgspec.structs import replace
from pwdlib.exceptions import PwdlibError
from pwdlib.hashers.argon2 import Argon2Hasher

from shared.commands.log import read_password_hash
from shared.commands.registry import CommandRegistry
from shared.commands.states import load
from shared.folds.errors import Invalid, OverLimit, Unauthenticated
from shared.platform.fairness import Slots
from shared.platform.postgres import Reads
from write_service.domain.login import LOGIN, Login, login_id
from write_service.domain.user_types import StartUserRegistration
from write_service.tries import Tries

T = TypeVar("T")

THREADS = 2
WAITING_MAX = 512
NOBODY = "00000000-0000-0000-0000-000000000000"


class Passwords:
    """Hashes and checks passwords. The parameters are those that OWASP recommends: 19 MiB, two passes, one lane."""

    def __init__(self) -> None:
        self._hasher = Argon2Hasher(time_cost=2, memory_cost=19 * 1024, parallelism=1)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="passwords")
        self._slots = Slots(THREADS, WAITING_MAX, _too_many)
        self._nobodys_hash = self._hasher.hash(secrets.token_urlsafe(16))

    async def prepare(self, tenant: str, command: StartUserRegistration) -> StartUserRegistration:
        """The tenant's command with the hash in the password's place. Raises OverLimit (TOO_MANY_PASSWORDS)."""
        return replace(command, password=await self._in_thread(tenant, self._hasher.hash, command.password))

    async def matches(self, tenant: str, password: str, password_hash: str | None) -> bool:
        """Whether the password matches. Raises OverLimit (TOO_MANY_PASSWORDS).

        False if there is no hash, after the time that a real check takes, so that the time does not tell whether a login exists.
        """
        right = await self._in_thread(tenant, self._verify, password, password_hash or self._nobodys_hash)
        return right and password_hash is not None

    def _verify(self, password: str, password_hash: str) -> bool:
        try:
            return self._hasher.verify(password, password_hash)
        except PwdlibError:  # a hash of another kind
            return False

    async def _in_thread(self, tenant: str, work: Callable[..., T], *arguments: str) -> T:
        async with self._slots.one(tenant):
            return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    async def close(self) -> None:
        """Ends the threads when their work is done."""
        await asyncio.to_thread(self._threads.shutdown)


def _too_many() -> OverLimit:
    return OverLimit("TOO_MANY_PASSWORDS", "too many passwords are being worked on", retry_after_s=1.0)


class PasswordVerifier:
    """Finds the user of a login and password. A wrong password, an unknown login and a deactivated user's get one answer.

    A deactivation takes login and hash away in one transaction. If it comes between the two look-ups, the hash is gone: the
    login's next holder is not asked for the password of the one before. An unknown login takes the same two look-ups and the
    same hash as a known one.
    """

    def __init__(self, registry: CommandRegistry, reads: Reads, passwords: Passwords, tries: Tries) -> None:
        self._registry = registry
        self._reads = reads
        self._passwords = passwords
        self._tries = tries

    async def verify(self, tenant: str, login: str, password: str) -> str:
        """The user's id. Raises Unauthenticated (LOGIN_REFUSED), or OverLimit (TOO_MANY_TRIES, TOO_MANY_PASSWORDS)."""
        try:
            held = login_id(tenant, login)
        except Invalid:  # no such login can exist, which is nobody's business
            held = NOBODY
        if not await self._tries.count(tenant, held):
            raise OverLimit("TOO_MANY_TRIES", "too many wrong passwords; wait a minute", retry_after_s=60.0)
        key = (tenant, LOGIN.category, held)
        async with self._reads.connection() as connection:
            state = (await load(connection, self._registry, [key]))[key].state
            # A login that is boxed or unreadable is answered as an unknown one.
            user_id = state.holder_id if isinstance(state, Login) and state.confirmed else NOBODY
            password_hash = await read_password_hash(connection, tenant, user_id)
        if not await self._passwords.matches(tenant, password, password_hash):
            raise Unauthenticated("LOGIN_REFUSED", "the login or the password is wrong")
        await self._tries.forget(tenant, held)
        return user_id

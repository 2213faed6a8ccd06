"""Passwords: hashed and checked in threads of their own, and a door that tells nothing by what it says or does."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from shared.commands.states import Boxed, Unreadable
from shared.folds.errors import OverLimit, Refusal, Unauthenticated
from write_service import passwords
from write_service.domain.login import Login, login_id
from write_service.domain.user_types import StartUserRegistration
from write_service.passwords import NOBODY, THREADS, WAITING_MAX, Passwords, PasswordVerifier
from write_service.tries import PER_LOGIN_A_MINUTE, PER_TENANT_A_MINUTE

RIGHT, WRONG = "correct horse battery", "correct horse batteries"


class CountingHasher:
    """The real hasher, with what was asked of it and in which threads."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.asked: list[str] = []
        self.threads: set[str] = set()

    def hash(self, password: str) -> str:
        self._saw("hash")
        text: str = self._inner.hash(password)
        return text

    def verify(self, password: str, password_hash: str) -> bool:
        self._saw("verify")
        right: bool = self._inner.verify(password, password_hash)
        return right

    def _saw(self, what: str) -> None:
        self.asked.append(what)
        self.threads.add(threading.current_thread().name)


class FakeReads:
    """Connections that nobody uses, counted."""

    def __init__(self) -> None:
        self.taken = 0

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[None]:
        self.taken += 1
        yield None


class FakeTries:
    """Counts for ever, as the database does for a minute."""

    def __init__(self) -> None:
        self.counted: Counter[tuple[str, str]] = Counter()

    async def count(self, tenant: str, login_id: str) -> bool:
        """False if there were too many."""
        if self.counted[tenant, login_id] >= PER_LOGIN_A_MINUTE or self.counted[tenant, ""] >= PER_TENANT_A_MINUTE:
            return False
        self.counted[tenant, login_id] += 1
        self.counted[tenant, ""] += 1
        return True

    async def forget(self, tenant: str, login_id: str) -> None:
        """The password was right."""
        self.counted[tenant, login_id] = 0
        self.counted[tenant, ""] -= 1


class House:
    """A door, its hasher, and who lives there: Alice holds the login `alice`, Bob has reserved `bob`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passwords = Passwords()
        right_hash = self.passwords._hasher.hash(RIGHT)
        self.hasher = CountingHasher(self.passwords._hasher)
        self.passwords._hasher = self.hasher  # type: ignore[assignment]
        self.reads = FakeReads()
        self.door = PasswordVerifier(None, self.reads, self.passwords, FakeTries())  # type: ignore[arg-type]
        self.looked_up: Counter[str] = Counter()
        holders: dict[str, Any] = {
            login_id("acme", "alice"): Login(holder_id="u-alice", confirmed=True),
            login_id("acme", "dora"): Login(holder_id="u-dora", confirmed=True),
            login_id("acme", "eve"): Boxed(),
            login_id("acme", "fay"): Unreadable(),
            login_id("acme", "bob"): Login(holder_id="u-bob", expires_at_ms=2**62),
        }
        hashes = {("acme", "u-alice"): right_hash, ("acme", "u-bob"): right_hash}

        async def load(_: object, __: object, keys: list[tuple[str, str, str]]) -> dict[Any, Any]:
            self.looked_up["login"] += 1
            return {key: Loaded(holders.get(key[2], Login())) for key in keys}

        async def read_password_hash(_: object, tenant: str, user_id: str) -> str | None:
            self.looked_up["hash"] += 1
            return hashes.get((tenant, user_id))

        monkeypatch.setattr(passwords, "load", load)
        monkeypatch.setattr(passwords, "read_password_hash", read_password_hash)


class Loaded:
    """An aggregate as it is read."""

    def __init__(self, state: Any) -> None:
        self.state = state


@pytest.fixture
async def house(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[House]:
    """A house whose threads end with the test."""
    house = House(monkeypatch)
    yield house
    await house.passwords.close()


# (tenant, login, password)
TRIES = {
    "right": ("acme", "ALICE", RIGHT),
    "wrong": ("acme", "alice", WRONG),
    "unknown": ("acme", "carol", RIGHT),
    "known in another tenant": ("umbrella", "alice", RIGHT),
    "only reserved": ("acme", "bob", RIGHT),
    "deactivated between the two look-ups": ("acme", "dora", RIGHT),
    "boxed": ("acme", "eve", RIGHT),
    "unreadable": ("acme", "fay", RIGHT),
    "with a space": ("acme", "al ice", RIGHT),
    "with a control character": ("acme", "alice\0", RIGHT),
    "invisible": ("acme", "\u200b", RIGHT),
}


@pytest.mark.parametrize("name", TRIES)
async def test_every_try_costs_the_same(house: House, name: str) -> None:
    """Right, wrong, unknown or no login at all: one connection, two look-ups, one hash; and one answer to all but the right."""
    tenant, login, password = TRIES[name]
    if name == "right":
        assert await house.door.verify(tenant, login, password) == "u-alice"
    else:
        with pytest.raises(Unauthenticated) as refused:
            await house.door.verify(tenant, login, password)
        assert (refused.value.reason, refused.value.facts) == ("LOGIN_REFUSED", {})
        assert str(refused.value) == "the login or the password is wrong"
    assert (house.reads.taken, house.looked_up) == (1, {"login": 1, "hash": 1})
    assert house.hasher.asked == ["verify"]


async def test_the_hash_of_nobody_is_nobodys_password(house: House) -> None:
    """Even one who knew that hash's password would not be let in."""
    house.passwords._nobodys_hash = house.hasher.hash(RIGHT)
    assert not await house.passwords.matches("acme", RIGHT, None)
    with pytest.raises(Unauthenticated):
        await house.door.verify("acme", "carol", RIGHT)


async def test_a_hash_of_another_kind_lets_nobody_in(house: House) -> None:
    """It is no defect either."""
    assert not await house.passwords.matches("acme", RIGHT, "$2b$12$abcdefghijklmnopqrstuv")
    assert not await house.passwords.matches("acme", RIGHT, "")


async def refusals(door: PasswordVerifier, times: int, login: Callable[[int], str], tenant: str = "acme") -> Counter[str]:
    """What so many tries are answered with."""
    reasons: Counter[str] = Counter()
    for nth in range(times):
        try:
            await door.verify(tenant, login(nth), WRONG)
        except Refusal as refusal:
            reasons[refusal.reason] += 1
    return reasons


async def test_ten_tries_a_minute_for_a_login(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """However it is written; other logins and tenants are not kept waiting."""
    monkeypatch.setattr(house.hasher, "verify", lambda password, _: password == RIGHT)
    ways = ["alice", "ALICE", "\uff41lice"]
    assert await refusals(house.door, 15, lambda nth: ways[nth % 3]) == {"LOGIN_REFUSED": 10, "TOO_MANY_TRIES": 5}
    with pytest.raises(OverLimit) as refused:
        await house.door.verify("acme", "alice", RIGHT)
    assert refused.value.retry_after_s == 60
    assert await refusals(house.door, 1, lambda _: "bob") == {"LOGIN_REFUSED": 1}
    assert await refusals(house.door, 1, lambda _: "alice", "umbrella") == {"LOGIN_REFUSED": 1}


async def test_a_right_password_is_no_try(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """And forgives the wrong ones before it: whoever logs in often is not locked out."""
    monkeypatch.setattr(house.hasher, "verify", lambda password, _: password == RIGHT)
    for _ in range(3):
        assert await refusals(house.door, 9, lambda _: "alice") == {"LOGIN_REFUSED": 9}
        for _ in range(5):
            assert await house.door.verify("acme", "alice", RIGHT) == "u-alice"


async def test_a_tenant_that_registers_thousands_delays_no_other_by_more_than_a_turn(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All threads and all room to wait are one tenant's; another's password is checked within the next few."""
    done, gate = [], threading.Semaphore(0)

    def hash_(password: str) -> str:
        gate.acquire(timeout=20)
        done.append(password)
        return password

    monkeypatch.setattr(house.hasher, "hash", hash_)
    flood = [asyncio.create_task(house.passwords.prepare("acme", start_of("acme"))) for _ in range(THREADS + WAITING_MAX)]
    await asyncio.sleep(0)
    other = asyncio.create_task(house.passwords.prepare("umbrella", start_of("umbrella")))
    await asyncio.sleep(0)
    for _ in range(2 * THREADS):
        gate.release()
    await other
    assert done.index("umbrella") <= 2 * THREADS
    for _ in flood:
        gate.release()
    ended = await asyncio.gather(*flood, return_exceptions=True)
    given_up = [refusal for refusal in ended if isinstance(refusal, OverLimit)]
    assert [refusal.reason for refusal in given_up] == ["TOO_MANY_PASSWORDS"], "the newest gave its place to the other tenant"


async def test_a_try_too_many_costs_no_hash_and_no_look_up(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """So guessing cannot keep the threads from others."""
    monkeypatch.setattr(house.hasher, "verify", lambda password, _: password == RIGHT)
    await refusals(house.door, 10, lambda _: "alice")
    taken = house.reads.taken
    assert await refusals(house.door, 5, lambda _: "alice") == {"TOO_MANY_TRIES": 5}
    assert house.reads.taken == taken


async def test_six_hundred_tries_a_minute_for_a_tenant(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trying one password on many logins is guessing too."""
    monkeypatch.setattr(house.hasher, "verify", lambda password, _: password == RIGHT)
    found = await refusals(house.door, 605, lambda nth: f"login{nth}")
    assert found == {"LOGIN_REFUSED": 600, "TOO_MANY_TRIES": 5}
    assert await refusals(house.door, 1, lambda _: "alice", "umbrella") == {"LOGIN_REFUSED": 1}


def start_of(password: str) -> StartUserRegistration:
    """A registration as it comes."""
    return StartUserRegistration(user_id=NOBODY, login="alice", email="", password=password)


async def test_hashes_are_of_the_parameters_that_owasp_recommends(house: House) -> None:
    """19 MiB, two passes, one lane; salted, so that the same password never gives the same hash twice."""
    one, other = await house.passwords.prepare("acme", start_of(RIGHT)), await house.passwords.prepare("acme", start_of(RIGHT))
    assert one.password.startswith("$argon2id$v=19$m=19456,t=2,p=1$")
    assert one.password != other.password
    assert await house.passwords.matches("acme", RIGHT, one.password)
    assert not await house.passwords.matches("acme", WRONG, one.password)


async def test_what_looks_like_a_hash_is_hashed_too(house: House) -> None:
    """Else a stolen hash would be a password."""
    stolen = (await house.passwords.prepare("acme", start_of(RIGHT))).password
    prepared = (await house.passwords.prepare("acme", start_of(stolen))).password
    assert prepared != stolen
    assert not await house.passwords.matches("acme", RIGHT, prepared)
    assert await house.passwords.matches("acme", stolen, prepared)


async def test_two_threads_hash_and_the_loop_none(house: House) -> None:
    """However many come at once."""
    await asyncio.gather(*[house.passwords.prepare("acme", start_of(RIGHT)) for _ in range(8)])
    assert len(house.hasher.threads) <= THREADS == 2
    assert all(name.startswith("passwords") for name in house.hasher.threads)


async def test_no_more_wait_than_can_be_served(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """One too many is told so at once; when the others are done there is room again."""
    go = threading.Event()
    monkeypatch.setattr(house.hasher, "hash", lambda _: str(go.wait(20)))
    waiting = [asyncio.create_task(house.passwords.prepare("acme", start_of(RIGHT))) for _ in range(THREADS + WAITING_MAX)]
    try:
        await asyncio.sleep(0)
        with pytest.raises(OverLimit) as refused:
            await house.passwords.prepare("acme", start_of(RIGHT))
        assert (refused.value.reason, refused.value.retry_after_s) == ("TOO_MANY_PASSWORDS", 1)
    finally:
        go.set()
    await asyncio.gather(*waiting)
    assert (await house.passwords.prepare("acme", start_of(RIGHT))).password == "True"

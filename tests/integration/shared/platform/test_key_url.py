"""The issuer's keys from a URL: rotation, outages, how often it is asked, and where it may lead."""

from __future__ import annotations

import asyncio
import io
import json
import ssl
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from joserfc import jwt
from joserfc.jwk import OKPKey

from shared.folds.errors import Refusal
from shared.platform import keys as platform_keys
from shared.platform import telemetry
from shared.platform.keys import SIZE_MAX, KeyUrl
from shared.platform.settings import ServerSettings
from shared.platform.tokens import Verifier
from shared.rpc.server import Server
from tests.support.system.authority import Authority
from tests.support.system.waiting import eventually

NOW = 1_800_000_000.0
ISSUER, AUDIENCE = "https://issuer.example", "foldline"
OLD, NEW, STRANGE = (OKPKey.generate_key("Ed25519", {"kid": kid}) for kid in ("old", "new", "strange"))


def key_set(*keys: OKPKey) -> bytes:
    """What an issuer publishes."""
    return json.dumps({"keys": [key.as_dict(private=False) for key in keys]}).encode()


def token(key: OKPKey, kid: str | None = None) -> str:
    """A token of the issuer, by a key of it or of somebody else."""
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "tenant": "acme", "exp": NOW + 60}
    return jwt.encode({"alg": "Ed25519", "kid": kid or key.kid}, claims, key, algorithms=["Ed25519"])


class Issuer:
    """Publishes a key set over HTTPS. `release` lets answers go; `asked` counts requests.

    While `slow` is set, an answer's header never ends, but has one more line every 20 ms.
    """

    def __init__(self, authority: Authority) -> None:
        self.answer, self.status, self.asked = key_set(OLD), 200, 0
        self.release = threading.Event()
        self.release.set()
        self.slow, self.hung_up = False, threading.Event()
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.asked += 1
                issuer.release.wait(20)
                self.send_response(issuer.status)
                try:
                    while issuer.slow:
                        self.send_header("x", "y")
                        self.flush_headers()
                        issuer.hung_up.wait(0.02)
                except OSError:
                    issuer.hung_up.set()
                    return
                if issuer.status == 302:
                    self.send_header("location", "/elsewhere")
                self.end_headers()
                self.wfile.write(issuer.answer)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        files = authority.issue("issuer")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(files.cert, files.key)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = f"https://localhost:{self._server.server_port}/keys"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def close(self) -> None:
        """Goes away."""
        self.release.set()
        self.slow = False
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """Whom the issuer's certificate is of."""
    return Authority(tmp_path)


@pytest.fixture
def issuer(authority: Authority) -> Iterator[Issuer]:
    """An issuer with one key."""
    issuer = Issuer(authority)
    yield issuer
    issuer.close()


class Time:
    """A time that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class World:
    """A verifier whose keys are kept fresh, and its log."""

    def __init__(self, keys: KeyUrl, time: Time, log: io.BytesIO) -> None:
        self.time = time
        self.keys = keys
        self.verifier = Verifier(keys, issuer=ISSUER, audience=AUDIENCE, clock=lambda: NOW)
        self._log = log

    def answer(self, of: str) -> str:
        """The tenant that a token speaks for, or why it is refused."""
        try:
            return self.verifier.verify(of).tenant
        except Refusal as refusal:
            return refusal.reason

    def lines(self, event: str) -> list[dict[str, Any]]:
        """The lines of the log for an event."""
        return [line for line in map(json.loads, self._log.getvalue().splitlines()) if line["event"] == event]


@asynccontextmanager
async def verifying(issuer: Issuer, authority: Authority, **options: Any) -> AsyncIterator[World]:
    """Keeps the keys of an issuer fresh."""
    log, time = io.BytesIO(), Time()
    telemetry.configure("info", service="test", stream=log)
    options = {"ca_file": authority.ca, "allow_private": True, **options}
    world = World(KeyUrl(issuer.url, clock=time, **options), time, log)
    running = asyncio.create_task(world.keys.run())
    try:
        yield world
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_key_that_is_new_is_fetched_when_a_token_names_it(issuer: Issuer, authority: Authority) -> None:
    """The caller is told to try again while it is fetched; a key that left the set is believed no more."""
    async with verifying(issuer, authority) as world:
        assert world.answer(token(OLD)) == "KEYS_AWAITED"
        await eventually(lambda: world.answer(token(OLD)) == "acme", 10)
        assert await world.keys.failure() == ""
        issuer.answer = key_set(NEW)
        world.time.now += 11
        assert world.answer(token(NEW)) == "KEYS_AWAITED"
        assert world.answer(token(OLD)) == "acme"
        await eventually(lambda: world.answer(token(NEW)) == "acme", 10)
        assert world.answer(token(OLD)) == "TOKEN_INVALID"
        assert issuer.asked == 2


async def test_tokens_that_name_random_keys_cause_no_fetch_each(issuer: Issuer, authority: Authority) -> None:
    """One for all of ten seconds, and none for a key that was asked for; who has a known key notices nothing."""
    async with verifying(issuer, authority) as world:
        await eventually(lambda: world.answer(token(OLD)) == "acme", 10)
        forged = [token(STRANGE, f"random-{number}") for number in range(200)]
        assert {world.answer(each) for each in forged} == {"TOKEN_INVALID"}  # the set was fetched just now
        world.time.now += 11
        assert {world.answer(each) for each in forged} == {"KEYS_AWAITED"}
        await eventually(lambda: world.answer(forged[1]) == "TOKEN_INVALID", 10)
        assert {world.answer(each) for each in forged} == {"TOKEN_INVALID"}
        world.time.now += 11
        assert world.answer(forged[0]) == "TOKEN_INVALID"  # it was asked for, and is not there
        assert world.answer(token(OLD)) == "acme"
        assert issuer.asked == 2


async def test_nobody_waits_for_an_issuer_that_is_slow(issuer: Issuer, authority: Authority) -> None:
    """The fetch is in another thread: calls are answered while it hangs."""
    async with verifying(issuer, authority) as world:
        await eventually(lambda: world.answer(token(OLD)) == "acme", 10)
        issuer.release.clear()
        world.time.now += 11
        issuer.answer = key_set(OLD, NEW)
        assert world.answer(token(NEW)) == "KEYS_AWAITED"
        await eventually(lambda: issuer.asked == 2, 10)
        assert (world.answer(token(OLD)), world.answer(token(NEW))) == ("acme", "KEYS_AWAITED")
        issuer.release.set()
        await eventually(lambda: world.answer(token(NEW)) == "acme", 10)


async def test_an_issuer_whose_header_never_ends_stops_no_rotation(
    issuer: Issuer, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fetch fails as a whole, leaves no connection behind, and is tried again."""
    async with verifying(issuer, authority, refresh_s=0.02, apart_s=0.02) as world:
        await eventually(lambda: world.answer(token(OLD)) == "acme", 10)
        monkeypatch.setattr(platform_keys, "FETCH_TIMEOUT_S", 0.3)
        issuer.slow, issuer.answer = True, key_set(NEW)
        await eventually(lambda: world.lines("keys_not_fetched"), 2)
        assert world.lines("keys_not_fetched")[0]["error"] == "localhost did not answer in full within 0.3 s"
        assert world.answer(token(OLD)) == "acme"
        assert await asyncio.to_thread(issuer.hung_up.wait, 5)
        issuer.slow = False
        await eventually(lambda: world.answer(token(NEW)) == "acme", 10)


@pytest.mark.parametrize(
    ("status", "answer", "why"),
    [
        (500, b"", "localhost answered 500"),
        (302, b"", "localhost answered 302"),
        (200, b"{", "is not a set of keys"),
        (200, b'{"keys": []}', "is not a set of keys"),
        (200, b" " * (SIZE_MAX + 1), f"answered more than {SIZE_MAX} bytes"),
        (0, b"", "ConnectError"),
    ],
    ids=["broken", "led elsewhere", "garbage", "empty", "too large", "away"],
)
async def test_an_issuer_that_is_away_or_broken_leaves_the_known_keys(
    issuer: Issuer, authority: Authority, status: int, answer: bytes, why: str
) -> None:
    """The log says so once, however often it is tried."""
    async with verifying(issuer, authority, refresh_s=0.02, apart_s=0.02) as world:
        await eventually(lambda: world.answer(token(OLD)) == "acme", 10)
        if status:
            issuer.status, issuer.answer = status, answer
            asked = issuer.asked
            await eventually(lambda: issuer.asked > asked + 3, 10)
        else:
            issuer.close()
        await eventually(lambda: world.lines("keys_not_fetched"), 10)
        assert world.answer(token(OLD)) == "acme"
        told = world.lines("keys_not_fetched")
        assert len(told) == 1
        assert why in told[0]["error"]
        assert await world.keys.failure() == ""


async def test_a_server_without_keys_is_not_ready_and_says_why(issuer: Issuer, authority: Authority, tmp_path: Path) -> None:
    """A foreign certificate and a private address that is not allowed are no keys; the process starts all the same."""
    foreign = Authority(tmp_path, "foreign")
    for settings, why in (
        ({"jwks_private": True, "jwks_ca_file": foreign.ca}, "certificate verify failed"),
        ({"jwks_ca_file": authority.ca}, "localhost has an address that is not public, and FOLDLINE_JWKS_PRIVATE is not set"),
    ):
        server = Server(ServerSettings(jwks_url=issuer.url, **settings), roles={})
        await server.start()
        try:

            async def told(server: Server = server, why: str = why) -> bool:
                await server.probes.readiness.ask()
                return why in server.probes.readiness.failures.get("keys", "")

            await eventually(told, 10)
        finally:
            await server.drain()
    assert issuer.asked == 0


def test_plain_http_reaches_private_addresses_alone() -> None:
    """Whoever changes the answer on its way through the public network would issue tokens."""
    keys = KeyUrl("http://93.184.216.34/keys", allow_private=True)
    with pytest.raises(ValueError, match=r"93.184.216.34 is public: it must be https"):
        keys._fetch()

"""Who is believed: every way in which a token can be wrong, on both services, and what it gives away (nothing)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc.aio
import pytest
from joserfc import jwt
from joserfc.jwk import OKPKey

from deploy.local.system import READ, WRITE
from shared.platform.identity import Role
from tests.e2e.conftest import Caller
from tests.support.clients.bank import Refused, channels, item, new_id, read_refusal, register
from tests.support.system.stack import Stack

METHODS = {
    WRITE: "/bank.v1.AccountService/DepositMoney",
    READ: "/bank.v1.AccountQueryService/GetAccount",
}
HOUR_S = 3600


class Forge:
    """Makes tokens like those of the system's issuer, with something changed."""

    def __init__(self, stack: Stack) -> None:
        self.key: OKPKey = stack.issuer._key
        now = int(time.time())
        self.claims: dict[str, Any] = {
            "iss": "https://foldline.localhost",
            "aud": "foldline",
            "sub": "alice",
            "tenant": "acme",
            "roles": ["user"],
            "iat": now,
            "nbf": now,
            "exp": now + HOUR_S,
        }
        self.header = {"alg": "Ed25519", "kid": self.key.kid}

    def token(self, *, key: OKPKey | None = None, header: dict[str, Any] | None = None, **claims: Any) -> str:
        """Properly signed; a claim of None is left out."""
        merged = {name: value for name, value in {**self.claims, **claims}.items() if value is not None}
        return jwt.encode({**self.header, **(header or {})}, merged, key or self.key, algorithms=["Ed25519"])

    def by_hand(self, header: dict[str, Any], sign: Callable[[bytes], bytes]) -> str:
        """With any header and signature."""
        signed = ".".join(map(_base64, (json.dumps(header).encode(), json.dumps(self.claims).encode())))
        return f"{signed}.{_base64(sign(signed.encode()))}"

    def stranger(self) -> OKPKey:
        """Another key that bears the issuer's key id."""
        return OKPKey.generate_key("Ed25519", {"kid": str(self.key.kid)}, private=True)


def _base64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _public_bytes(forge: Forge) -> bytes:
    return base64.urlsafe_b64decode(str(forge.key.as_dict(private=False)["x"]) + "==")


def _tampered(forge: Forge) -> str:
    head, _, signature = forge.token().split(".")
    return ".".join((head, _base64(json.dumps({**forge.claims, "roles": ["operator"]}).encode()), signature))


BAD: dict[str, tuple[Callable[[Forge], str], str]] = {
    "no header": (lambda f: "", "TOKEN_MISSING"),
    "an empty bearer": (lambda f: "Bearer ", "TOKEN_MISSING"),
    "another scheme": (lambda f: f"Basic {f.token()}", "TOKEN_MISSING"),
    "the bare token": (lambda f: f.token(), "TOKEN_MISSING"),
    "garbage": (lambda f: "Bearer garbage", "TOKEN_INVALID"),
    "three parts of garbage": (lambda f: "Bearer a.b.c", "TOKEN_INVALID"),
    "5000 characters": (lambda f: "Bearer " + "a" * 5000, "TOKEN_INVALID"),
    "without its signature": (lambda f: "Bearer " + f.token().rpartition(".")[0] + ".", "TOKEN_INVALID"),
    "other claims under the same signature": (lambda f: f"Bearer {_tampered(f)}", "TOKEN_INVALID"),
    "expired": (lambda f: f"Bearer {f.token(exp=int(time.time()) - 60)}", "TOKEN_EXPIRED"),
    "without an end": (lambda f: f"Bearer {f.token(exp=None)}", "TOKEN_INVALID"),
    "an end that is no number": (lambda f: f"Bearer {f.token(exp='never')}", "TOKEN_INVALID"),
    "not valid yet": (lambda f: f"Bearer {f.token(nbf=int(time.time()) + 60)}", "TOKEN_INVALID"),
    "forged key": (lambda f: f"Bearer {f.token(key=f.stranger())}", "TOKEN_INVALID"),
    "unknown key id": (lambda f: f"Bearer {f.token(header={'kid': 'other'})}", "TOKEN_INVALID"),
    "no key id": (lambda f: f"Bearer {f.by_hand({'alg': 'Ed25519'}, lambda _: b'x' * 64)}", "TOKEN_INVALID"),
    "wrong audience": (lambda f: f"Bearer {f.token(aud='elsewhere')}", "TOKEN_INVALID"),
    "no audience": (lambda f: f"Bearer {f.token(aud=None)}", "TOKEN_INVALID"),
    "wrong issuer": (lambda f: f"Bearer {f.token(iss='https://evil.example')}", "TOKEN_INVALID"),
    "algorithm none": (lambda f: f"Bearer {f.by_hand({**f.header, 'alg': 'none'}, lambda _: b'')}", "TOKEN_INVALID"),
    "algorithm none, signed": (
        lambda f: f"Bearer {f.by_hand({**f.header, 'alg': 'none'}, lambda _: b'x' * 64)}",
        "TOKEN_INVALID",
    ),
    "HS256 with the public key's bytes": (
        lambda f: (
            "Bearer "
            + f.by_hand({**f.header, "alg": "HS256"}, lambda text: hmac.new(_public_bytes(f), text, hashlib.sha256).digest())
        ),
        "TOKEN_INVALID",
    ),
    "HS256 with the public key as it is published": (
        lambda f: (
            "Bearer "
            + f.by_hand(
                {**f.header, "alg": "HS256"},
                lambda text: hmac.new(json.dumps(f.key.as_dict(private=False)).encode(), text, hashlib.sha256).digest(),
            )
        ),
        "TOKEN_INVALID",
    ),
    "no tenant": (lambda f: f"Bearer {f.token(tenant=None)}", "TOKEN_INVALID"),
    "a tenant that is none": (lambda f: f"Bearer {f.token(tenant='../other')}", "TOKEN_INVALID"),
    "several tenants": (lambda f: f"Bearer {f.token(tenant=['acme', 'other'])}", "TOKEN_INVALID"),
    "no user": (lambda f: f"Bearer {f.token(sub=None)}", "TOKEN_INVALID"),
    "a user with a control character": (lambda f: f"Bearer {f.token(sub='al' + chr(10) + 'ice')}", "TOKEN_INVALID"),
    "roles that are no list": (lambda f: f"Bearer {f.token(roles='user')}", "TOKEN_INVALID"),
}

WITHOUT_ROLE: dict[str, Callable[[Forge], str]] = {
    "no roles": lambda f: f.token(roles=[]),
    "roles left out": lambda f: f.token(roles=None),
    "a role that nobody knows": lambda f: f.token(roles=["superuser", 7, None]),
    "a role that does other things": lambda f: f.token(roles=["reader"]),
    "a role in capitals": lambda f: f.token(roles=["USER"]),
}


@pytest.fixture
async def ask(shared_stack: Stack) -> AsyncIterator[Callable[[str, str], Any]]:
    """Calls a service with an authorization header and a request that cannot even be read; returns the refusal."""
    async with channels(shared_stack) as (write, read):
        at = {WRITE: write, READ: read}

        async def asking(service: str, authorization: str, body: bytes = b"\xff") -> Refused:
            call: Any = at[service].unary_unary(METHODS[service])
            metadata = (("authorization", authorization),) if authorization else ()
            try:
                await call(body, metadata=metadata, timeout=20)
            except grpc.aio.AioRpcError as error:
                return read_refusal(error)
            raise AssertionError("accepted")

        yield asking


@pytest.mark.parametrize("service", METHODS)
@pytest.mark.parametrize("name", BAD)
async def test_a_bad_token_is_refused(shared_stack: Stack, ask: Any, service: str, name: str) -> None:
    """UNAUTHENTICATED, before anything of the request is looked at, and the token is not repeated to the caller."""
    make, reason = BAD[name]
    authorization = make(Forge(shared_stack))
    told = await ask(service, authorization)
    assert (told.code, told.reason) == ("UNAUTHENTICATED", reason)
    assert len(authorization) < 10 or authorization[8:] not in told.text


@pytest.mark.parametrize("service", METHODS)
@pytest.mark.parametrize("name", WITHOUT_ROLE)
async def test_a_caller_without_the_role_is_refused(shared_stack: Stack, ask: Any, service: str, name: str) -> None:
    """PERMISSION_DENIED, also before anything of the request is looked at; it says which roles would do."""
    told = await ask(service, f"Bearer {WITHOUT_ROLE[name](Forge(shared_stack))}")
    assert (told.code, told.reason) == ("PERMISSION_DENIED", "ROLE_MISSING")
    assert "user" in told.facts["roles"].split(", ")


@pytest.mark.parametrize("service", METHODS)
async def test_the_control_an_unchanged_token_is_believed(shared_stack: Stack, ask: Any, service: str) -> None:
    """What the forge makes without a change passes, however the scheme is written: the refusals above are earned."""
    token = Forge(shared_stack).token()
    for scheme in ("Bearer", "bearer", "BEARER"):
        told = await ask(service, f"{scheme} {token}")
        assert (told.code, told.reason) == ("INVALID_ARGUMENT", "MALFORMED_MESSAGE")


async def test_an_audience_in_a_list_is_believed(shared_stack: Stack, caller: Caller) -> None:
    """`aud` may be several, as RFC 7519 says."""
    bank = caller(token=Forge(shared_stack).token(aud=["elsewhere", "foldline"], tenant="t-aud"))
    _, receipt = await bank.register("Alice")
    assert receipt.version == 1


async def test_a_process_speaks_for_others_and_nobody_else_does(caller: Caller, tenant: str) -> None:
    """Role `process` sets tenant, user and cause of an item; the log says both who sent it and for whom."""
    process = caller(tenant="sagas", user_id="transfer", roles=[Role.PROCESS])
    person_id, cause = new_id(), new_id()
    [receipt] = await process.batch(
        item(register(person_id, "Alice"), tenant=tenant, on_behalf_of="alice", causation_id=cause.upper())
    )
    assert receipt.version == 1
    record = await caller().command(receipt.command_id)
    assert (record.user_id, record.on_behalf_of, record.causation_id) == ("transfer", "alice", cause)
    [event] = await caller().stream("person", person_id)
    metadata = event.metadata
    assert (event.tenant, metadata.user_id, metadata.on_behalf_of, metadata.causation_id) == (tenant, "transfer", "alice", cause)

"""Tokens: which are believed, and which are not."""

from __future__ import annotations

import base64
import hmac
import io
import json
import os
import stat
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from joserfc import jwt
from joserfc.errors import SecurityWarning
from joserfc.jwk import ECKey, OKPKey

from shared.folds.errors import Unauthenticated
from shared.platform import telemetry
from shared.platform.identity import Identity, Role
from shared.platform.keys import KeyFile
from shared.platform.tokens import DevelopmentIssuer, Verifier

ISSUER, AUDIENCE = "https://foldline.localhost", "foldline"
NOW = 1_800_000_000.0
CLAIMS = {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "tenant": "acme", "roles": ["user"], "exp": NOW + 60}


class Clock:
    """A time that the test moves."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def quiet() -> None:
    """The log goes nowhere."""
    telemetry.configure("info", service="test", stream=io.BytesIO())


@pytest.fixture
def clock() -> Clock:
    """The time for verifier and issuer."""
    return Clock()


KEY = OKPKey.generate_key("Ed25519", {"kid": "one"})
EC = ECKey.generate_key("P-256", {"kid": "two"})
OTHER = OKPKey.generate_key("Ed25519", {"kid": "one"})
ED448 = OKPKey.generate_key("Ed448", {"kid": "three"})
PUBLIC = {"keys": [key.as_dict(private=False) for key in (KEY, EC, ED448)]}


def sign(key: Any = KEY, alg: str = "Ed25519", kid: str | None = "one", **changes: Any) -> str:
    """A token that is good but for the changes; a claim of None is left out."""
    claims = {name: value for name, value in {**CLAIMS, **changes}.items() if value is not None}
    header = {"alg": alg} | ({"kid": kid} if kid else {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SecurityWarning)
        return jwt.encode(header, claims, key, algorithms=[alg])


@pytest.fixture
def verifier(tmp_path: Path, clock: Clock) -> Verifier:
    """Believes the keys of PUBLIC."""
    file = tmp_path / "jwks.json"
    file.write_text(json.dumps(PUBLIC))
    return Verifier(KeyFile(file), issuer=ISSUER, audience=AUDIENCE, leeway_s=30, clock=clock)


@pytest.mark.parametrize(
    "token",
    [
        sign(),
        sign(alg="EdDSA"),
        sign(EC, "ES256", "two"),
        sign(aud=["another", AUDIENCE]),
        sign(nbf=NOW + 29),
        sign(exp=NOW - 29),
        sign(roles=["user", "astronaut", 7]),
        sign(exp=NOW + 24 * 3600, iat=NOW),
    ],
    ids=["Ed25519", "EdDSA", "ES256", "one of several audiences", "nbf in leeway", "exp in leeway", "unknown roles", "a day"],
)
def test_a_good_token_names_tenant_user_and_roles(verifier: Verifier, token: str) -> None:
    """What the issuer signed is believed; a role that we do not know gives nothing."""
    assert verifier.verify(token) == Identity(tenant="acme", user_id="alice", roles=frozenset({Role.USER}))


NO_ALGORITHM, SYMMETRIC = b'{"alg":"none","kid":"one"}', b'{"alg":"HS256","kid":"one"}'


def unsigned() -> str:
    """A token that says it needs no signature."""
    body = sign().split(".")[1]
    return f"{encoded(NO_ALGORITHM)}.{body}."


def with_public_key_as_secret() -> str:
    """The classic forgery: signed with a symmetric algorithm, with the public key as the secret."""
    signed = f"{encoded(SYMMETRIC)}.{sign().split('.')[1]}"
    return f"{signed}.{encoded(hmac.digest(KEY.as_pem(private=False), signed.encode(), 'sha256'))}"


def encoded(raw: bytes) -> str:
    """As the parts of a token are."""
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        ("", "TOKEN_MISSING"),
        ("rubbish", "TOKEN_INVALID"),
        ("a.b.c", "TOKEN_INVALID"),
        ("é.é.é", "TOKEN_INVALID"),
        ("x" * 5000, "TOKEN_INVALID"),
        (sign() + "A", "TOKEN_INVALID"),
        (sign(OTHER), "TOKEN_INVALID"),
        (sign(kid=None), "TOKEN_INVALID"),
        (sign(kid="unknown"), "TOKEN_INVALID"),
        (sign(ED448, "EdDSA", "three"), "TOKEN_INVALID"),
        (unsigned(), "TOKEN_INVALID"),
        (with_public_key_as_secret(), "TOKEN_INVALID"),
        (sign(exp=NOW - 30), "TOKEN_EXPIRED"),
        (sign(exp=None), "TOKEN_INVALID"),
        (sign(exp="tomorrow"), "TOKEN_INVALID"),
        (sign(exp=float("nan")), "TOKEN_INVALID"),
        (sign(exp=True), "TOKEN_INVALID"),
        (sign(nbf=NOW + 31), "TOKEN_INVALID"),
        (sign(iss="https://elsewhere"), "TOKEN_INVALID"),
        (sign(iss=None), "TOKEN_INVALID"),
        (sign(aud="another"), "TOKEN_INVALID"),
        (sign(aud=None), "TOKEN_INVALID"),
        (sign(tenant=None), "TOKEN_INVALID"),
        (sign(tenant=""), "TOKEN_INVALID"),
        (sign(tenant="Acme"), "TOKEN_INVALID"),
        (sign(tenant="a.b"), "TOKEN_INVALID"),
        (sign(tenant="acme\n"), "TOKEN_INVALID"),
        (sign(tenant="a" * 64), "TOKEN_INVALID"),
        (sign(sub=None), "TOKEN_INVALID"),
        (sign(sub=""), "TOKEN_INVALID"),
        (sign(sub="a" * 129), "TOKEN_INVALID"),
        (sign(sub="a\nb"), "TOKEN_INVALID"),
        (sign(roles="user"), "TOKEN_INVALID"),
        (sign(exp=NOW + 24 * 3600 + 31), "TOKEN_INVALID"),
        (sign(exp=NOW + 10, iat=NOW - 24 * 3600 - 21), "TOKEN_INVALID"),
        (sign(iat="yesterday"), "TOKEN_INVALID"),
    ],
)
def test_any_other_token_is_refused(verifier: Verifier, token: str, reason: str) -> None:
    """Forged, expired, for somebody else, of another algorithm or malformed: UNAUTHENTICATED, never an exception else."""
    with pytest.raises(Unauthenticated) as caught:
        verifier.verify(token)
    assert caught.value.reason == reason


def test_a_remembered_token_expires_all_the_same(verifier: Verifier, clock: Clock) -> None:
    """Remembering saves the signature's check, not the time's."""
    token = sign()
    verifier.verify(token)
    clock.now = NOW + 60 + 29
    verifier.verify(token)
    clock.now = NOW + 60 + 30
    with pytest.raises(Unauthenticated, match="expired"):
        verifier.verify(token)


def test_keys_rotate_without_a_restart(tmp_path: Path, clock: Clock) -> None:
    """A key that left the file is not believed a second later, not even in a token that was; a new one is."""
    file, ticks = tmp_path / "jwks.json", Clock()
    file.write_text(json.dumps(PUBLIC))
    verifier = Verifier(KeyFile(file, clock=ticks), issuer=ISSUER, audience=AUDIENCE, clock=clock)
    fresh = OKPKey.generate_key("Ed25519", {"kid": "fresh"})
    old_token, new_token = sign(), sign(fresh, kid="fresh")
    verifier.verify(old_token)
    file.write_text(json.dumps({"keys": [fresh.as_dict(private=False)]}))
    verifier.verify(old_token)  # looked at a moment ago
    ticks.now += 1
    assert verifier.verify(new_token).tenant == "acme"
    with pytest.raises(Unauthenticated):
        verifier.verify(old_token)


@pytest.mark.parametrize(
    "broken", [None, b"", b"{", b"[]", b"{}", b'{"keys": []}', b'{"keys": 7}', b'{"keys": [{"kty": "RSA"}]}']
)
def test_a_broken_key_file_leaves_the_last_good_keys(tmp_path: Path, clock: Clock, broken: bytes | None) -> None:
    """Whoever breaks the file does not lock everybody out, nor let anybody in."""
    file, ticks = tmp_path / "jwks.json", Clock()
    file.write_text(json.dumps(PUBLIC))
    verifier = Verifier(KeyFile(file, clock=ticks), issuer=ISSUER, audience=AUDIENCE, clock=clock)
    if broken is None:
        file.unlink()
    else:
        file.write_bytes(broken)
    ticks.now += 1
    assert verifier.verify(sign()).tenant == "acme"
    with pytest.raises((OSError, ValueError)):
        KeyFile(file)


def test_the_development_issuer_keeps_its_key_to_itself(tmp_path: Path, clock: Clock) -> None:
    """The private key is readable for its owner alone, the published set holds nothing private, and both stay."""
    folder = tmp_path / "keys"
    first = DevelopmentIssuer(folder, clock=clock)
    verifier = Verifier(KeyFile(first.jwks_file), issuer=ISSUER, audience=AUDIENCE, clock=clock)
    second = DevelopmentIssuer(folder, clock=clock)
    token = second.issue(tenant="umbrella", user_id="ada", roles=[Role.OPERATOR, Role.READER], lifetime_s=5)
    assert verifier.verify(token) == Identity(tenant="umbrella", user_id="ada", roles=frozenset({Role.OPERATOR, Role.READER}))
    assert stat.S_IMODE(os.stat(folder / "issuer.json").st_mode) == 0o600
    assert '"d"' not in first.jwks_file.read_text()
    assert sorted(os.listdir(folder)) == ["issuer.json", "jwks.json"]


def test_two_issuers_made_at_once_have_one_key(tmp_path: Path, clock: Clock) -> None:
    """Whoever comes second uses the winner's key; no token of either is refused."""
    with ThreadPoolExecutor(8) as pool:
        issuers = list(pool.map(lambda _: DevelopmentIssuer(tmp_path, clock=clock), range(8)))
    verifier = Verifier(KeyFile(tmp_path / "jwks.json"), issuer=ISSUER, audience=AUDIENCE, clock=clock)
    for issuer in issuers:
        assert verifier.verify(issuer.issue(tenant="acme", user_id="alice", roles=[])).user_id == "alice"


@pytest.mark.parametrize(("tenant", "user"), [("Acme", "alice"), ("", "alice"), ("acme", ""), ("acme", "a" * 129)])
def test_no_token_is_issued_that_no_service_would_believe(tmp_path: Path, tenant: str, user: str) -> None:
    """A misspelt name is told at once."""
    with pytest.raises(ValueError, match="not a"):
        DevelopmentIssuer(tmp_path).issue(tenant=tenant, user_id=user, roles=[Role.USER])

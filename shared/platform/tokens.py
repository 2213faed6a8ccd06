"""Bearer tokens: verifies them, and issues them for development.

A token is a JWT signed with Ed25519 or ES256 by a key of the issuer's published set. Its claims: `iss`, `aud`, `sub`
(the user), `exp`, optional `nbf` and `iat`, `tenant`, `roles`. Any other token is refused as UNAUTHENTICATED.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeGuard

from joserfc import jwt
from joserfc.errors import JoseError, SecurityWarning
from joserfc.jwk import GuestProtocol, OKPKey

from shared.folds.errors import Unauthenticated
from shared.platform.identity import Identity, Role
from shared.platform.keys import Key, KeyFile, Keys, KeyUrl
from shared.platform.settings import CannotStart, ServerSettings

# Nothing symmetric and no "none": a public key must never pass as a secret. "EdDSA" is the older name of "Ed25519".
ALGORITHMS = ("Ed25519", "EdDSA", "ES256")
TENANT = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
USER_LENGTH_MAX = 128
TOKEN_LENGTH_MAX = 4096
_CACHE_SIZE_MAX = 10_000
_ROLES = {role.value: role for role in Role}

Clock = Callable[[], float]


class Verifier:
    """Tells who a token speaks for. A token that was believed is remembered until its end or until the keys change."""

    def __init__(
        self,
        keys: Keys,
        *,
        issuer: str,
        audience: str,
        leeway_s: float = 30,
        lifetime_s_max: float = 24 * 3600,
        clock: Clock = time.time,
    ) -> None:
        """`leeway_s`: how far the issuer's clock may differ. `lifetime_s_max`: from a token's issue, or from now, to its end."""
        self._lifetime_s_max = lifetime_s_max
        self.keys = keys
        self._issuer = issuer
        self._audience = audience
        self._leeway_s = leeway_s
        self._clock = clock
        self._known: dict[str, tuple[Identity, float]] = {}
        self._known_by: object = None

    def verify(self, token: str) -> Identity:
        """Raises Unauthenticated: TOKEN_MISSING, TOKEN_EXPIRED or TOKEN_INVALID; Unavailable: KEYS_AWAITED."""
        keys = self.keys.current()
        if keys is not self._known_by:
            self._known, self._known_by = {}, keys
        if found := self._known.get(token):
            identity, expires_at = found
            if self._clock() < expires_at + self._leeway_s:
                return identity
            del self._known[token]
        if not token:
            raise Unauthenticated("TOKEN_MISSING", "the call carries no bearer token")
        identity, expires_at = self._identify(self._claims(token, keys))
        if len(self._known) >= _CACHE_SIZE_MAX:
            self._known.clear()
        self._known[token] = identity, expires_at
        return identity

    def _claims(self, token: str, keys: dict[str, Key]) -> dict[str, Any]:
        """What the token says, once its signature is believed."""

        def find(guest: GuestProtocol) -> Key:
            kid = guest.headers().get("kid")
            key = keys.get(kid) if isinstance(kid, str) else None
            if key is None:
                self.keys.ask_for(kid if isinstance(kid, str) else "")
                raise _invalid("its key is unknown")
            return key

        if len(token) > TOKEN_LENGTH_MAX:
            raise _invalid("it is too long")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SecurityWarning)  # of the older name of Ed25519
                return jwt.decode(token, find, algorithms=ALGORITHMS).claims
        # A token is the caller's text: whatever trips over it, it is not believed.
        except (JoseError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise _invalid("it is malformed, or its signature is wrong") from error

    def _identify(self, claims: dict[str, Any]) -> tuple[Identity, float]:
        now = self._clock()
        expires_at, not_before, audience = claims.get("exp"), claims.get("nbf", 0), claims.get("aud")
        issued_at = claims.get("iat", now)
        if not _is_number(expires_at) or not _is_number(not_before) or not _is_number(issued_at):
            raise _invalid("exp, nbf or iat is not a time")
        if now >= expires_at + self._leeway_s:
            raise Unauthenticated("TOKEN_EXPIRED", "the token has expired")
        if now < not_before - self._leeway_s:
            raise _invalid("it is not valid yet")
        if expires_at - min(issued_at, now) > self._lifetime_s_max + self._leeway_s:
            raise _invalid("it is valid for too long")
        if claims.get("iss") != self._issuer:
            raise _invalid("it is from another issuer")
        if self._audience not in (audience if isinstance(audience, list) else [audience]):
            raise _invalid("it is for another audience")
        tenant, user_id, roles = claims.get("tenant"), claims.get("sub"), claims.get("roles", [])
        if not isinstance(tenant, str) or not TENANT.fullmatch(tenant):
            raise _invalid("it names no tenant")
        if not isinstance(user_id, str) or not 0 < len(user_id) <= USER_LENGTH_MAX or not user_id.isprintable():
            raise _invalid("it names no user")
        if not isinstance(roles, list):
            raise _invalid("its roles are not a list")
        # A role that we do not know gives nothing, and another system may know it.
        known = frozenset(_ROLES[role] for role in roles if isinstance(role, str) and role in _ROLES)
        return Identity(tenant=tenant, user_id=user_id, roles=known), expires_at


def open_verifier(settings: ServerSettings) -> Verifier:
    """The verifier that the settings describe. Raises CannotStart if keys or authorities cannot be read."""
    try:
        keys = _open_keys(settings)
    except OSError as error:
        raise CannotStart(f"FOLDLINE_JWKS_FILE: {settings.jwks_file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CannotStart(f"FOLDLINE_JWKS_{'FILE' if settings.jwks_url is None else 'CA_FILE'}: {error}") from None
    return Verifier(
        keys,
        issuer=settings.token_issuer,
        audience=settings.token_audience,
        leeway_s=settings.token_leeway_s,
        lifetime_s_max=settings.token_lifetime_s_max,
    )


def _open_keys(settings: ServerSettings) -> Keys:
    if settings.jwks_url is not None:
        return KeyUrl(settings.jwks_url, ca_file=settings.jwks_ca_file, allow_private=settings.jwks_private)
    assert settings.jwks_file is not None  # one of the two is required
    return KeyFile(settings.jwks_file)


class DevelopmentIssuer:
    """Issues tokens with a key that it made itself. For development and tests: whoever reads its folder is anybody."""

    def __init__(
        self,
        folder: Path,
        *,
        issuer: str = "https://foldline.localhost",
        audience: str = "foldline",
        clock: Clock = time.time,
    ) -> None:
        """Opens the issuer of `folder`, or makes it: `issuer.json` (the private key, mode 0600) and `jwks.json`.

        Two processes that do so at once end up with the same key: the first to finish wins, both use the winner's.
        """
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.jwks_file = folder / "jwks.json"
        private = folder / "issuer.json"
        if not private.exists():
            made = OKPKey.generate_key("Ed25519", {"use": "sig", "alg": "Ed25519"}, private=True, auto_kid=True)
            with suppress(FileExistsError):
                _write(private, made.as_dict(private=True), replace=False)
        self._key = OKPKey.import_key(json.loads(private.read_bytes()))
        published = {"keys": [self._key.as_dict(private=False)]}
        if not self.jwks_file.exists() or json.loads(self.jwks_file.read_bytes()) != published:
            _write(self.jwks_file, published, replace=True)
        self._issuer, self._audience, self._clock = issuer, audience, clock

    def issue(self, *, tenant: str, user_id: str, roles: Iterable[Role], lifetime_s: float = 12 * 3600) -> str:
        """A token for the user of the tenant. Raises ValueError for a name that no service would believe."""
        if not TENANT.fullmatch(tenant):
            raise ValueError(f"not a tenant's name: {tenant!r} (lower-case letters, digits, hyphens; 63 at the most)")
        if not 0 < len(user_id) <= USER_LENGTH_MAX or not user_id.isprintable():
            raise ValueError(f"not a user's name: {user_id!r}")
        now = int(self._clock())
        claims = {
            "iss": self._issuer,
            "aud": self._audience,
            "sub": user_id,
            "tenant": tenant,
            "roles": sorted(roles),
            "iat": now,
            "nbf": now,
            "exp": int(now + lifetime_s),
        }
        return jwt.encode({"alg": "Ed25519", "kid": self._key.kid}, claims, self._key, algorithms=["Ed25519"])


def _invalid(why: str) -> Unauthenticated:
    return Unauthenticated("TOKEN_INVALID", f"the token is not believed: {why}")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15


def _write(path: Path, content: dict[str, Any], *, replace: bool) -> None:
    """Writes a file that is there entirely or not at all, with mode 0600. Raises FileExistsError unless `replace`."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(content, file)
        if replace:
            os.replace(name, path)
        else:
            os.link(name, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name)

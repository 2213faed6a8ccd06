"""Text that services give to clients and take back, which clients can neither read nor change: AES-SIV (RFC 5297).

The same content under the same key gives the same text. Whoever opens it says what it is bound to, the tenant for one; under
another binding it does not open.
"""

from __future__ import annotations

from typing import Annotated

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV
from pydantic import AfterValidator, SecretStr

from shared.platform import base64url

KEYS_MAX = 4
KEY_BYTES = 32
SEALED_CHARACTERS_MAX = 1024


class NotOurs(ValueError):
    """The text was not sealed with one of the keys for this binding."""


class Seal:
    """Seals with the first of the keys, and opens what was sealed with any of them."""

    def __init__(self, keys: str) -> None:
        """`keys`: 64 hexadecimal digits each, separated by commas. Raises ValueError for others, and for more than 4."""
        try:
            found = [bytes.fromhex(key.strip()) for key in keys.split(",")]
        except ValueError:
            found = []
        if not 1 <= len(found) <= KEYS_MAX or any(len(key) != KEY_BYTES for key in found):
            raise ValueError(f"must be 1 to {KEYS_MAX} keys of {2 * KEY_BYTES} hexadecimal digits, separated by commas")
        self._ciphers = [AESSIV(key) for key in found]

    def seal(self, content: bytes, *binding: str) -> str:
        """The content as text for clients, in the alphabet of base64url."""
        return base64url.encode(self._ciphers[0].encrypt(content, [part.encode() for part in binding]))

    def open(self, text: str, *binding: str, characters_max: int = SEALED_CHARACTERS_MAX) -> bytes:
        """The content that was sealed for this binding. Raises NotOurs, also for a longer text than `characters_max`."""
        if len(text) > characters_max:
            raise NotOurs
        try:
            sealed = base64url.decode(text)
        except ValueError:
            raise NotOurs from None
        bound = [part.encode() for part in binding]
        for cipher in self._ciphers:
            try:
                return cipher.decrypt(sealed, bound)
            except (InvalidTag, ValueError):
                continue
        raise NotOurs


def _checked(keys: SecretStr) -> SecretStr:
    Seal(keys.get_secret_value())
    return keys


SealKeys = Annotated[SecretStr, AfterValidator(_checked)]
"""The setting that holds the keys."""

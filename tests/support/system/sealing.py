"""The keys that tests seal tokens with, and tokens that no service would have made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msgspec.structs import replace

from shared.line import consistency
from shared.platform.seal import Seal

KEYS = "5e" * 32
SEAL = Seal(KEYS)


def token_with(seal_keys: Path, tenant: str, token: str, **changes: Any) -> str:
    """A tenant's real consistency token with something changed in it."""
    seal = Seal(seal_keys.read_text().strip())
    return consistency.encode(replace(consistency.decode(token, seal, tenant), **changes), seal, tenant)


def place_of(seal_keys: Path, tenant: str, token: str) -> consistency.Token:
    """The place that a tenant's consistency token holds."""
    return consistency.decode(token, Seal(seal_keys.read_text().strip()), tenant)

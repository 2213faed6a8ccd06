"""Bytes as text that goes into URLs, headers and command lines as it is: base64url without padding (RFC 4648 §5)."""

from __future__ import annotations

import base64


def encode(content: bytes) -> str:
    """The bytes as text."""
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def decode(text: str) -> bytes:
    """The bytes that `encode` made this text of. Raises ValueError for text in another alphabet."""
    return base64.b64decode(text.encode("ascii") + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)

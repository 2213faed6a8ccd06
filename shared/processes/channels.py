"""Channels, and the contacts of tenants that they reach. Contacts are settings of the deployment:

{"umbrella": {"owner": {"email": "ada@umbrella.example"},
"audit": {"url": "https://hooks.umbrella.example/foldline", "secret": "whsec_…", "mode": "binary"}}}
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, SecretStr, TypeAdapter, ValidationError, field_validator

from shared.platform.telemetry import logger
from shared.processes.delivery_store import Delivery

log = logger(__name__)


class NotDelivered(Exception):
    """The receiver did not take a message, or nobody knows whether it did. `reason` is UPPER_SNAKE; no personal data in it."""

    def __init__(self, reason: str, text: str = "", *, final: bool = False, retry_after_s: float = 0.0) -> None:
        """`final`: another try would be refused as well. `retry_after_s`: the receiver asked for that pause."""
        super().__init__(f"{reason}: {text}" if text else reason)
        self.reason = reason
        self.final = final
        self.retry_after_s = retry_after_s


class Contact(BaseModel):
    """Where a tenant's contact is reached."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    email: str | None = None
    url: str | None = None
    # Of the Standard Webhooks scheme.
    secret: SecretStr | None = None
    # How CloudEvents are put into HTTP.
    mode: Literal["structured", "binary"] = "structured"

    @field_validator("email")
    @classmethod
    def one_address(cls, value: str | None) -> str | None:
        """Refuses anything but one address, because it could add recipients or headers."""
        if value is not None and (not value.isprintable() or value.count("@") != 1 or set(value) & set(" ,;<>\"'()")):
            raise ValueError("not a single e-mail address")
        return value


class Channel(Protocol):
    """Sends deliveries to receivers outside, in one way."""

    async def send(self, delivery: Delivery, contact: Contact) -> None:
        """Sends a delivery; returns when the receiver has taken it. Raises NotDelivered."""


class Deferred:
    """A channel that is made for its first delivery, because importing its libraries takes a second."""

    def __init__(self, make: Callable[[], Channel]) -> None:
        """`make` imports and makes the channel; it is called in another thread."""
        self._make = make
        self._channel: Channel | None = None

    async def send(self, delivery: Delivery, contact: Contact) -> None:
        """Sends by the channel. Raises NotDelivered."""
        if self._channel is None:
            # Two first calls at once make two channels; the later one is kept.
            self._channel = await asyncio.to_thread(self._make)
        await self._channel.send(delivery, contact)


_CONTACTS: TypeAdapter[dict[str, dict[str, Contact]]] = TypeAdapter(dict[str, dict[str, Contact]])


class Contacts:
    """The contacts in a file. It is read again when it changes."""

    def __init__(self, file: Path | None) -> None:
        """Without a file there are no contacts."""
        self._file = file
        self._read_at: tuple[int, int] | None = None
        self._known: dict[str, dict[str, Contact]] = {}

    def find(self, tenant: str, name: str) -> Contact:
        """A tenant's contact. Raises NotDelivered (CONTACT_UNKNOWN, CONTACTS_UNREADABLE): the file may be mended."""
        self._refresh()
        contact = self._known.get(tenant, {}).get(name)
        if contact is None:
            raise NotDelivered("CONTACT_UNKNOWN", f"tenant {tenant} has no contact {name}")
        return contact

    def _refresh(self) -> None:
        if self._file is None:
            return
        try:
            stat = os.stat(self._file)
            read_at = (stat.st_mtime_ns, stat.st_size)
            if read_at != self._read_at:
                self._known = _CONTACTS.validate_json(self._file.read_bytes())
                self._read_at = read_at
        except OSError as error:
            raise NotDelivered("CONTACTS_UNREADABLE", error.strerror or "") from error
        except ValidationError as error:
            # The text of the error shows the input, which holds addresses and secrets: only the places are told.
            places = "; ".join(".".join(map(str, each["loc"])) for each in error.errors(include_input=False))
            raise NotDelivered("CONTACTS_UNREADABLE", places) from None

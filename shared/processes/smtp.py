"""E-mail over SMTP.

A message has the same Message-ID at every try, so a mailbox can recognise a second copy. There is one only if the connection
or this process died after the server had accepted the message and before our database said so.
"""

from __future__ import annotations

import re
import ssl
from datetime import UTC
from email import policy
from email.headerregistry import Address
from email.message import EmailMessage
from email.utils import format_datetime
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote, urlsplit

from shared.folds.delivery import Email
from shared.processes.announce import load
from shared.processes.channels import Contact, NotDelivered
from shared.processes.delivery_store import Delivery

if TYPE_CHECKING:
    import aiosmtplib

TIMEOUT_S = 20.0

_STARTTLS = {"required": True, "opportunistic": None, "off": False}
_DOMAIN = re.compile(r"[A-Za-z0-9.-]+")
_ENHANCED = re.compile(r"\b[245]\.\d{1,3}\.\d{1,3}\b")


class Smtp:
    """The channel for e-mail.

    The URL is smtp://user:password@host:587?starttls=required|opportunistic|off, or smtps:// for TLS from the first byte.
    STARTTLS is required unless the URL says otherwise.
    """

    def __init__(self, url: str, sender: str, *, tls_context: ssl.SSLContext | None = None, timeout_s: float = TIMEOUT_S) -> None:
        """`sender` is the From address, as in `sender_of`. Raises ValueError for it, and for a URL that is none of these."""
        parts = urlsplit(url)
        if parts.scheme not in ("smtp", "smtps") or not parts.hostname:
            raise ValueError("the SMTP URL is smtp://host:port or smtps://host:port")
        starttls = parse_qs(parts.query).get("starttls", ["required"])[0]
        if starttls not in _STARTTLS:
            raise ValueError(f"starttls is one of {', '.join(_STARTTLS)}")
        self._host = parts.hostname
        self._tls = parts.scheme == "smtps"
        self._port = parts.port or (465 if self._tls else 587)
        self._starttls = False if self._tls else _STARTTLS[starttls]
        self._user = unquote(parts.username) if parts.username else None
        self._password = unquote(parts.password) if parts.password else None
        self._sender = sender_of(sender)
        self._tls_context = tls_context
        self._timeout_s = timeout_s

    @property
    def over_tls(self) -> bool:
        """Whether nothing is ever sent in plain text: a server without TLS gets no message."""
        return self._tls or self._starttls is True

    async def send(self, delivery: Delivery, contact: Contact) -> None:
        """Sends an e-mail; returns when the server has accepted it. Raises NotDelivered."""
        if contact.email is None:
            raise NotDelivered("CONTACT_WITHOUT_EMAIL", f"contact {delivery.recipient}")
        import aiosmtplib  # noqa: PLC0415 (0.2 s of a start, for who sends e-mail)

        message = self.compose(delivery, contact.email)
        client = aiosmtplib.SMTP(
            hostname=self._host,
            port=self._port,
            username=self._user,
            password=self._password,
            use_tls=self._tls,
            start_tls=self._starttls,
            tls_context=self._tls_context,
            timeout=self._timeout_s,
        )
        try:
            async with client:
                await client.send_message(message, sender=self._sender.addr_spec, recipients=[contact.email])
        except aiosmtplib.SMTPRecipientsRefused as error:
            raise _refused(error.recipients[0]) from None
        except aiosmtplib.SMTPAuthenticationError as error:
            # Our own configuration is wrong: when it is mended, the messages should still be sent.
            raise NotDelivered("SMTP_LOGIN_REFUSED", str(error.code)) from None
        except aiosmtplib.SMTPResponseException as error:
            raise _refused(error) from None
        except (aiosmtplib.SMTPException, OSError, ssl.SSLError) as error:
            raise NotDelivered("SMTP_AWAY", type(error).__name__) from None

    def compose(self, delivery: Delivery, address: str) -> EmailMessage:
        """The message. Raises NotDelivered (HEADER_REFUSED) for a header that would not be one line."""
        content = load(delivery.channel, delivery.content)
        assert isinstance(content, Email)  # the channel's own
        message = EmailMessage(policy=policy.SMTP)
        try:
            message["From"] = str(self._sender)
            message["To"] = address
            message["Subject"] = content.subject
        except ValueError:
            raise NotDelivered("HEADER_REFUSED", "a header must be one line", final=True) from None
        message["Message-ID"] = f"<{delivery.delivery_id}@{self._sender.domain}>"
        # From the delivery, not from the try, so a second copy has the same bytes.
        message["Date"] = format_datetime(delivery.created_at.astimezone(UTC))
        message["Auto-Submitted"] = "auto-generated"
        message.set_content(content.text)
        if content.html:
            message.add_alternative(content.html, subtype="html")
            message.set_boundary(f"=_{delivery.delivery_id}")
        return message


def sender_of(text: str) -> Address:
    """The sender of e-mails, `bank@example.com` or `The Bank <bank@example.com>`. Raises ValueError for all else."""
    message = EmailMessage(policy=policy.SMTP)
    try:
        message["From"] = text
        header = message["From"]
        [group] = header.groups
        [address] = group.addresses
    except (ValueError, IndexError):  # the header's parser raises the latter for "bank@"
        pass
    else:
        one = group.display_name is None and not header.defects and text.isprintable()
        if one and address.username.isascii() and _DOMAIN.fullmatch(address.domain):
            return Address(address.display_name, address.username, address.domain)
    raise ValueError("a sender is one e-mail address, as in bank@example.com or The Bank <bank@example.com>")


def _refused(error: aiosmtplib.SMTPResponseException | aiosmtplib.SMTPRecipientRefused) -> NotDelivered:
    """The codes of the server's answer. Its text is left out, because it may hold the address."""
    enhanced = _ENHANCED.search(error.message or "")
    text = f"{error.code} {enhanced.group()}" if enhanced else str(error.code)
    return NotDelivered("SMTP_REFUSED", text, final=500 <= error.code < 600)


def smtp_is_over_tls(url: str) -> bool:
    """Whether the URL has every message sent over TLS. Raises ValueError for a URL that is none of SMTP."""
    return Smtp(url, "foldline@localhost").over_tls

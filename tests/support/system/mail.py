"""A real SMTP server in this process, whose answers a test chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email import message_from_bytes, policy
from email.message import EmailMessage
from typing import Any

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, Envelope, Session

from deploy.engines.child import free_port

ACCEPTED = "250 OK"


class Mailbox:
    """What arrived, in its order, and what the server answers. The server runs in a thread of its own."""

    def __init__(self) -> None:
        self.port = free_port()
        self.messages: list[EmailMessage] = []
        # The answer to a recipient, and to a message after it was taken; called with the address and the message.
        self.on_recipient: Callable[[str], str] = lambda address: ACCEPTED
        self.on_message: Callable[[EmailMessage], str] = lambda message: ACCEPTED
        self.encrypted: list[bool] = []

    @property
    def url(self) -> str:
        """Its URL, without TLS."""
        return f"smtp://127.0.0.1:{self.port}?starttls=off"

    def ids(self) -> list[str]:
        """The Message-ID of each message."""
        return [str(message["Message-ID"]) for message in self.messages]

    def subjects(self) -> list[str]:
        """The subject of each message."""
        return [str(message["Subject"]) for message in self.messages]

    async def handle_RCPT(  # noqa: N802 (aiosmtpd's name)
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        """A recipient."""
        answer = self.on_recipient(address)
        if answer == ACCEPTED:
            envelope.rcpt_tos.append(address)
        return answer

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802 (aiosmtpd's name)
        """A message. It is kept if it is accepted, whatever happens to the answer."""
        content = envelope.content
        assert isinstance(content, bytes)
        message = message_from_bytes(content, policy=policy.default)
        assert isinstance(message, EmailMessage)
        self.encrypted.append(session.ssl is not None)
        answer = self.on_message(message)
        if answer.startswith("250"):
            self.messages.append(message)
        return answer


@contextmanager
def serving(mailbox: Mailbox, **options: Any) -> Iterator[Mailbox]:
    """Runs the server on the mailbox's port."""
    controller = Controller(mailbox, hostname="127.0.0.1", port=mailbox.port, ready_timeout=10, **options)
    controller.start()
    try:
        yield mailbox
    finally:
        controller.stop()

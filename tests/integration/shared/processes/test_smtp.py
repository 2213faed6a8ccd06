"""E-mail over a real SMTP server: STARTTLS, log-in, and headers that nobody can add to."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import pytest
import trustme
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, Session

from shared.folds.delivery import Announcements, Email, Notice
from shared.processes import announce
from shared.processes.channels import Contact, Contacts, NotDelivered
from shared.processes.delivery_store import Delivery
from shared.processes.smtp import Smtp
from tests.support.system.mail import Mailbox, serving

SENDER = "bank@foldline.example"
ADA = Contact(email="ada@umbrella.example")


def delivery(content: Email) -> Delivery:
    """A claimed delivery of this content."""
    told = Announcements()
    told.notice("umbrella", "test", "test", "told", lambda notice: [content])
    cause = announce.Cause(("test",), "umbrella", "source", "", "")
    [made] = announce.of_notice(told, cause, "test", Notice(name="told", data={}))
    at = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    ids = (1, UUID("0190e4a0-0000-7000-8000-00000000000a"))
    facts = (made.tenant, made.name, made.channel, made.recipient, made.order_key, made.content, made.source)
    return Delivery(*ids, *facts, "", "", "pending", "", at, at, None, 1, True)


HELLO = delivery(Email(to="owner", subject="hello", text="about hello"))


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """An authority that nobody knows but who is told."""
    return trustme.CA()


@pytest.fixture
def certificate(authority: trustme.CA) -> ssl.SSLContext:
    """The server's certificate, for localhost."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    return context


@pytest.fixture
def trusting(authority: trustme.CA) -> ssl.SSLContext:
    """A client that knows the authority."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def smtp(mailbox: Mailbox, query: str = "", *, user: str = "", tls: ssl.SSLContext | None = None) -> Smtp:
    """A channel to the mailbox's server, by its name."""
    return Smtp(f"smtp://{user}localhost:{mailbox.port}{query}", SENDER, tls_context=tls, timeout_s=5)


async def failure(channel: Smtp, contact: Contact = ADA) -> NotDelivered:
    """Why the message was not taken."""
    with pytest.raises(NotDelivered) as refused:
        await channel.send(HELLO, contact)
    return refused.value


async def test_mail_goes_encrypted_where_the_server_offers_it(certificate: ssl.SSLContext, trusting: ssl.SSLContext) -> None:
    """STARTTLS is required unless the URL says otherwise, and used where it is only opportunistic."""
    with serving(Mailbox(), tls_context=certificate) as mailbox:
        await smtp(mailbox, tls=trusting).send(HELLO, ADA)
        await smtp(mailbox, "?starttls=opportunistic", tls=trusting).send(HELLO, ADA)
        assert mailbox.encrypted == [True, True]


async def test_without_starttls_nothing_is_sent_in_the_clear_unless_that_is_allowed() -> None:
    """A server (or somebody between) that offers no TLS gets no message; opportunistic sends all the same."""
    with serving(Mailbox()) as mailbox:
        failed = await failure(smtp(mailbox))
        assert (failed.reason, failed.final) == ("SMTP_AWAY", False)
        assert mailbox.messages == []
        await smtp(mailbox, "?starttls=opportunistic").send(HELLO, ADA)
        assert mailbox.encrypted == [False]


async def test_a_certificate_that_nobody_vouches_for_is_refused(certificate: ssl.SSLContext) -> None:
    """Neither a required nor an opportunistic STARTTLS goes on with it."""
    with serving(Mailbox(), tls_context=certificate) as mailbox:
        for query in ("", "?starttls=opportunistic"):
            failed = await failure(smtp(mailbox, query))
            assert (failed.reason, failed.final) == ("SMTP_AWAY", False)
        assert mailbox.messages == []


async def test_the_password_is_sent_over_tls_alone(certificate: ssl.SSLContext, trusting: ssl.SSLContext) -> None:
    """A right one is taken; a wrong one is our own configuration's mistake, which is waited for; neither is told."""

    def check(server: SMTP, session: Session, envelope: Envelope, mechanism: str, data: object) -> AuthResult:
        right = (getattr(data, "login", b""), getattr(data, "password", b"")) == (b"bank", b"s3cret")
        return AuthResult(success=right, handled=right)

    options = {"tls_context": certificate, "authenticator": check, "auth_required": True}
    with serving(Mailbox(), **options) as mailbox:
        await smtp(mailbox, user="bank:s3cret@", tls=trusting).send(HELLO, ADA)
        failed = await failure(smtp(mailbox, user="bank:wrong@", tls=trusting))
        assert (str(failed), failed.final) == ("SMTP_LOGIN_REFUSED: 535", False)
        assert mailbox.encrypted == [True]


@pytest.mark.parametrize("name", ["Ada\r\nBcc: mallory@example.com", "Ada\nX: y", "Ada\x00", "Ada\u2028Bcc: m@example.com"])
def test_a_line_break_in_a_subject_adds_no_header(name: str) -> None:
    """A fold that puts such a name into a subject fails: its input is kept as a dead delivery, and nothing is sent."""
    told = Announcements()
    told.notice("umbrella", "test", "test", "told", lambda it: [Email(to="owner", subject=f"Hello {it.data['name']}", text="")])
    cause = announce.Cause(("test",), "umbrella", "source", "", "")
    [made] = announce.of_notice(told, cause, "test", Notice(name="told", data={"name": name}))
    assert (made.channel, made.status, made.last_error) == (announce.FOLD, "dead", "FOLD_FAILED: ValueError")


@pytest.mark.parametrize("address", ["a@b.example\\r\\nBcc: m@x.example", "a@b.example,m@x.example", "<a@b.example>", "nobody"])
def test_an_address_that_would_add_a_recipient_or_a_header_is_no_contact(address: str, tmp_path: Path) -> None:
    """The file is refused as a whole, with the place of the mistake and without the address."""
    file = tmp_path / "contacts.json"
    file.write_text(f'{{"umbrella": {{"owner": {{"email": "{address}"}}}}}}')
    with pytest.raises(NotDelivered) as refused:
        Contacts(file).find("umbrella", "owner")
    assert (str(refused.value), refused.value.final) == ("CONTACTS_UNREADABLE: umbrella.owner.email", False)


async def test_a_long_subject_and_words_that_are_not_ascii_arrive_as_they_are() -> None:
    """Folding and encoding of headers are the library's; a line of a lone dot does not end the message."""
    subject, text = "Grüße " * 33, "first\n.\nQUIT\n.\nlast\n"
    with serving(Mailbox()) as mailbox:
        channel = smtp(mailbox, "?starttls=off")
        await channel.send(delivery(Email(to="owner", subject=subject.strip(), text=text)), ADA)
    [message] = mailbox.messages
    body = message.get_body(("plain",))
    assert body is not None
    assert (message["Subject"], body.get_content().splitlines()) == (subject.strip(), text.splitlines())
    assert message["Bcc"] is None


@asynccontextmanager
async def dying(answer: bytes) -> AsyncIterator[tuple[Smtp, list[bytes]]]:
    """A channel to a server that takes a message, answers that with these bytes, and is gone; and what it has taken."""
    taken: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 here\r\n")
        while not (await reader.readline()).upper().startswith(b"DATA"):
            writer.write(b"250 OK\r\n")
        writer.write(b"354 go on\r\n")
        taken.append(await reader.readuntil(b"\r\n.\r\n"))
        writer.write(answer)
        await writer.drain()
        writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        yield Smtp(f"smtp://127.0.0.1:{port}?starttls=off", SENDER, timeout_s=5), taken


async def test_a_server_that_takes_a_message_and_dies_before_it_says_so_is_sent_the_same_bytes_again() -> None:
    """Nobody knows whether it will deliver it: the second copy can be told by its Message-ID."""
    async with dying(b"") as (channel, taken):
        for _ in range(2):
            failed = await failure(channel)
            assert (failed.reason, failed.final) == ("SMTP_AWAY", False)
    assert len(taken) == 2
    assert taken[0] == taken[1]
    assert b"Message-ID: <0190e4a0-0000-7000-8000-00000000000a@foldline.example>" in taken[0]


async def test_a_server_that_has_said_yes_and_dies_before_the_farewell_has_the_message() -> None:
    """QUIT fails, and the delivery counts as sent: no second copy."""
    async with dying(b"250 taken\r\n") as (channel, taken):
        await channel.send(HELLO, ADA)
    assert len(taken) == 1

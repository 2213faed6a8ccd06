"""Webhooks over real HTTP: signed, bounded in time and size, never to an address of our own network."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from uuid import UUID, uuid4

import pytest
import trustme
from pydantic import SecretStr
from standardwebhooks import Webhook as Verifier
from standardwebhooks import WebhookVerificationError

from shared.folds.delivery import Announcements, Notice, Outgoing, Webhook
from shared.processes import announce
from shared.processes.channels import Contact, NotDelivered
from shared.processes.delivery_store import Delivery
from shared.processes.webhook import WebhookChannel
from tests.support.system.endpoint import taking

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
CREATED_AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def delivery(content: Webhook, delivery_id: UUID | None = None) -> Delivery:
    """A claimed delivery of this content."""
    [made] = announce.of_notice(
        announcing(content), announce.Cause(("test",), "umbrella", "source", "", ""), "test", Notice(name="told", data={})
    )
    ids = (1, delivery_id or made.delivery_id)
    facts = (made.tenant, made.name, made.channel, made.recipient, made.order_key, made.content, made.source)
    return Delivery(*ids, *facts, "", "", "pending", "", CREATED_AT, CREATED_AT, None, 1, True)


def announcing(*messages: Outgoing) -> Announcements:
    """Announcements whose fold returns these messages."""
    told = Announcements()
    told.notice("umbrella", "test", "test", "told", lambda notice: messages)
    return told


HELLO = Webhook(to="audit", type="com.example.hello", data={"amount_minor": 7, "text": "Grüße"}, subject="thing-1")
LOCAL = WebhookChannel("/foldline", allow_private=True, timeout_s=5)


async def failure(channel: WebhookChannel, url: str, content: Webhook = HELLO) -> NotDelivered:
    """Why a delivery to this address was not taken."""
    with pytest.raises(NotDelivered) as refused:
        await channel.send(delivery(content), Contact(url=url))
    return refused.value


async def test_a_structured_event_is_signed_by_the_standard_webhooks_scheme() -> None:
    """The receiver verifies it with the scheme's own library; a changed body, another id or another secret is found out."""
    made = delivery(HELLO, UUID("0190e4a0-0000-7000-8000-00000000000a"))
    async with taking() as endpoint:
        await LOCAL.send(made, Contact(url=endpoint.url, secret=SecretStr(SECRET)))
    [request] = endpoint.requests
    assert request.line == "POST /hook HTTP/1.1"
    assert request.headers["content-type"] == "application/cloudevents+json"
    assert request.headers["host"] == f"localhost:{endpoint.port}"
    assert request.headers["webhook-id"] == "0190e4a0-0000-7000-8000-00000000000a"
    assert Verifier(SECRET).verify(request.body, request.headers) == {
        "specversion": "1.0",
        "id": "0190e4a0-0000-7000-8000-00000000000a",
        "source": "/foldline/umbrella",
        "type": "com.example.hello",
        "subject": "thing-1",
        "time": "2026-01-02T03:04:05Z",
        "datacontenttype": "application/json",
        "data": {"amount_minor": 7, "text": "Grüße"},
    }
    for secret, body, headers in (
        (SECRET, request.body.replace(b"7", b"8", 1), request.headers),
        (SECRET, request.body, {**request.headers, "webhook-id": str(uuid4())}),
        ("whsec_AAAA", request.body, request.headers),
    ):
        with pytest.raises(WebhookVerificationError):
            Verifier(secret).verify(body, headers)


async def test_a_binary_event_has_its_attributes_as_headers_and_is_signed_too() -> None:
    """The body is the data alone. Without a secret there is no signature."""
    async with taking() as endpoint:
        await LOCAL.send(delivery(HELLO), Contact(url=endpoint.url, secret=SecretStr(SECRET), mode="binary"))
        await LOCAL.send(delivery(HELLO), Contact(url=endpoint.url, mode="binary"))
    signed, plain = endpoint.requests
    assert json.loads(signed.body) == {"amount_minor": 7, "text": "Grüße"}
    headers = {name: signed.headers[name] for name in ("content-type", "ce-specversion", "ce-type", "ce-source", "ce-subject")}
    assert headers == {
        "content-type": "application/json",
        "ce-specversion": "1.0",
        "ce-type": "com.example.hello",
        "ce-source": "/foldline/umbrella",
        "ce-subject": "thing-1",
    }
    Verifier(SECRET).verify(signed.body, signed.headers)
    assert "webhook-signature" not in plain.headers


async def test_a_secret_that_is_none_is_waited_for() -> None:
    """It is a mistake in the contacts' file, which may be mended; the reason does not show the secret."""
    with pytest.raises(NotDelivered) as refused:
        await LOCAL.send(delivery(HELLO), Contact(url="http://localhost:1/", secret=SecretStr("whsec_not base64!é")))
    assert (str(refused.value), refused.value.final) == ("WEBHOOK_SECRET_INVALID", False)


async def test_a_receiver_that_hangs_is_given_up_after_the_time_limit() -> None:
    """Silent after the request, or one byte now and then: both end at the limit, and are tried again."""
    channel = WebhookChannel("/foldline", allow_private=True, timeout_s=0.5)

    async def drip(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
        while not writer.is_closing():
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.05)

    async def silence(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(3)

    for answer in (silence, drip):
        async with taking() as endpoint:
            endpoint.answer = answer
            began = time.monotonic()
            failed = await failure(channel, endpoint.url)
            assert (failed.reason, failed.final) == ("WEBHOOK_TIMED_OUT", False)
            assert time.monotonic() - began < 2
            assert len(endpoint.requests) == 1


async def test_a_redirect_is_not_followed() -> None:
    """The place that it names gets no request."""
    async with taking() as endpoint, taking() as inner:
        endpoint.answers(f"HTTP/1.1 307 Temporary Redirect\r\nlocation: {inner.url}\r\ncontent-length: 0\r\n\r\n".encode())
        failed = await failure(LOCAL, endpoint.url)
    assert (str(failed), failed.final) == ("WEBHOOK_REDIRECTED: 307", False)
    assert inner.requests == []


async def test_an_answer_of_ten_megabytes_is_not_read() -> None:
    """Its status counts. Only its beginning is read, besides what the two sockets hold."""
    written = 0

    async def endless(writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 10000000\r\n\r\n")
        for _ in range(1000):
            writer.write(b"x" * 10_000)
            await writer.drain()
            written += 10_000

    async with taking() as endpoint:
        endpoint.answer = endless
        await LOCAL.send(delivery(HELLO), Contact(url=endpoint.url))
    assert written < 9_000_000


@pytest.mark.parametrize(
    ("answer", "reason", "final", "wait_s"),
    [
        ("HTTP/1.1 500 Oops\r\ncontent-length: 6\r\n\r\nsecret", "WEBHOOK_REFUSED: 500", False, 0),
        ("HTTP/1.1 429 Slow\r\nretry-after: 30\r\ncontent-length: 0\r\n\r\n", "WEBHOOK_REFUSED: 429", False, 30),
        ("HTTP/1.1 503 Later\r\nretry-after: 99999999\r\ncontent-length: 0\r\n\r\n", "WEBHOOK_REFUSED: 503", False, 3600),
        ("HTTP/1.1 410 Gone\r\ncontent-length: 0\r\n\r\n", "WEBHOOK_REFUSED: 410", True, 0),
        ("SSH-2.0-OpenSSH_9\r\n\r\n", "WEBHOOK_AWAY: RemoteProtocolError", False, 0),
        ("", "WEBHOOK_AWAY: RemoteProtocolError", False, 0),
    ],
)
async def test_what_a_receiver_says_decides_about_the_next_try(answer: str, reason: str, final: bool, wait_s: float) -> None:
    """410 is for good; a pause that it asks for is kept, an hour at most; the answer's text is not kept."""
    async with taking() as endpoint:
        endpoint.answers(answer.encode())
        failed = await failure(LOCAL, endpoint.url)
    assert (str(failed), failed.final, failed.retry_after_s) == (reason, final, wait_s)


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "127.0.0.1",
        "2130706433",  # the same as a number
        "10.1.2.3",
        "192.168.0.1",
        "169.254.169.254",  # where clouds keep credentials
        "100.64.0.1",
        "0.0.0.0",  # noqa: S104 (an address to refuse)
        "224.0.0.1",
        "[::1]",
        "[fe80::1]",
        "[fd00::1]",
        "[::ffff:127.0.0.1]",
        "[2002:7f00:1::]",  # 6to4 of 127.0.0.1
        "[64:ff9b::7f00:1]",  # NAT64 of 127.0.0.1
    ],
)
async def test_a_private_address_is_refused_for_good(host: str) -> None:
    """However it is written; no connection is made."""
    failed = await failure(WebhookChannel("/foldline"), f"https://{host}:9/hook")
    assert (failed.reason, failed.final) == ("WEBHOOK_ADDRESS_PRIVATE", True)


async def test_a_host_with_one_private_address_among_public_ones_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name may have several addresses: all must be public, because any of them could be tried."""
    loop = asyncio.get_running_loop()

    async def found(*args: object, **options: object) -> Sequence[tuple[object, ...]]:
        return [(2, 1, 6, "", ("93.184.215.14", 443)), (2, 1, 6, "", ("127.0.0.1", 443))]

    monkeypatch.setattr(loop, "getaddrinfo", found)
    assert (await failure(WebhookChannel("/foldline"), "https://two.example/hook")).reason == "WEBHOOK_ADDRESS_PRIVATE"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://example.com/hook", "WEBHOOK_NOT_HTTPS"),
        ("ftp://example.com/hook", "WEBHOOK_URL_INVALID"),
        ("https://user:secret@example.com/hook", "WEBHOOK_URL_INVALID"),
        ("https:///hook", "WEBHOOK_URL_INVALID"),
        ("https://exa\nmple.com/", "WEBHOOK_URL_INVALID"),
        ("https://nobody.invalid/hook", "WEBHOOK_HOST_UNKNOWN"),
    ],
)
async def test_an_address_that_is_none_is_refused_by_name(url: str, reason: str) -> None:
    """Plain http is for development alone; an unknown host may be known later."""
    failed = await failure(WebhookChannel("/foldline"), url)
    assert (failed.reason, failed.final) == (reason, reason != "WEBHOOK_HOST_UNKNOWN")


async def test_plain_http_is_refused_where_tls_is_required() -> None:
    """Private addresses may be reached all the same."""
    channel = WebhookChannel("/foldline", allow_private=True, allow_plain=False, timeout_s=5)
    assert (await failure(channel, "http://127.0.0.1:9/hook")).reason == "WEBHOOK_NOT_HTTPS"
    assert (await failure(channel, "https://127.0.0.1:9/hook")).reason != "WEBHOOK_NOT_HTTPS"


async def test_the_certificate_is_checked_for_the_name_and_not_for_the_address() -> None:
    """We connect to the address that was checked, and the certificate must be that of the name."""
    authority, server = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(server)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    async with taking(server) as endpoint:
        channel = WebhookChannel("/foldline", allow_private=True, tls_context=trusting, timeout_s=5)
        await channel.send(delivery(HELLO), Contact(url=endpoint.url))
        assert (await failure(LOCAL, endpoint.url)).reason == "WEBHOOK_AWAY"
        assert (await failure(channel, endpoint.url.replace("localhost", "127.0.0.1"))).reason == "WEBHOOK_AWAY"
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize("field", ["type", "subject"])
def test_a_line_break_in_an_attribute_adds_no_header(field: str) -> None:
    """The fold's message is refused, and its input is kept as a dead delivery."""
    fields = {"type": "com.example.hello", "subject": "thing", field: "x\r\nx-injected: yes"}
    told = Announcements()
    told.notice("umbrella", "test", "test", "told", lambda notice: [Webhook(to="audit", data={}, **fields)])
    cause = announce.Cause(("test",), "umbrella", "source", "", "")
    [made] = announce.of_notice(told, cause, "test", Notice(name="told", data={}))
    assert (made.channel, made.status, made.last_error) == (announce.FOLD, "dead", "FOLD_FAILED: ValueError")


async def test_words_that_are_not_ascii_are_escaped_in_headers() -> None:
    """Binary mode puts attributes into headers, which hold ASCII alone."""
    content = Webhook(to="audit", type="com.example.grüße", data={}, subject='näme "x" %')
    async with taking() as endpoint:
        await LOCAL.send(delivery(content), Contact(url=endpoint.url, mode="binary"))
    [request] = endpoint.requests
    assert request.headers["ce-type"] == "com.example.gr%C3%BC%C3%9Fe"
    assert request.headers["ce-subject"] == "n%C3%A4me%20%22x%22%20%25"

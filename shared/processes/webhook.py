"""Webhooks: CloudEvents 1.0 over HTTP, structured or binary, signed by the Standard Webhooks scheme.

The receiver recognises a repeat by `webhook-id`, which is the delivery's id and the same at every try. A tenant chooses the
address, so the request must not reach our own network: the host name is resolved here, addresses that are not public are
refused, and the connection goes to the address that was checked, without a second look-up.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx
from cloudevents.core.bindings.http import to_binary, to_structured
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from pydantic import SecretStr
from standardwebhooks import Webhook as Signer
from standardwebhooks.webhooks import EmptyWebhookSecretError

from shared.folds.delivery import Webhook as Content
from shared.platform.addresses import is_public
from shared.processes.announce import load
from shared.processes.channels import Contact, NotDelivered
from shared.processes.delivery_store import Delivery

CONNECT_TIMEOUT_S = 5.0
TIMEOUT_S = 15.0
ANSWER_BYTES_MAX = 64 * 1024
"""At most so many bytes of an answer are read: only its status matters."""


class WebhookChannel:
    """The channel for webhooks."""

    def __init__(
        self,
        source: str,
        *,
        allow_private: bool = False,
        allow_plain: bool = True,
        tls_context: ssl.SSLContext | None = None,
        timeout_s: float = TIMEOUT_S,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """`source` begins the `source` of every CloudEvent.

        `allow_private` lets private addresses pass, and plain http too if `allow_plain`.
        """
        self._source = source
        self._allow_private = allow_private
        self._allow_plain = allow_private and allow_plain
        self._tls_context = tls_context or ssl.create_default_context()
        self._timeout_s = timeout_s
        self._clock = clock

    async def send(self, delivery: Delivery, contact: Contact) -> None:
        """Posts a delivery; returns when the receiver answered 2xx. Raises NotDelivered."""
        if contact.url is None:
            raise NotDelivered("CONTACT_WITHOUT_URL", f"contact {delivery.recipient}")
        headers, body = self.compose(delivery, contact)
        try:
            # httpx's time-outs are for single reads: a receiver that sends a byte now and then would never run into one.
            async with asyncio.timeout(self._timeout_s):
                await self._post(httpx.URL(contact.url), headers, body)
        except TimeoutError:
            raise NotDelivered("WEBHOOK_TIMED_OUT", f"no answer within {self._timeout_s:g} s") from None
        except httpx.InvalidURL:
            raise NotDelivered("WEBHOOK_URL_INVALID", final=True) from None
        except httpx.HTTPError as error:
            raise NotDelivered("WEBHOOK_AWAY", type(error).__name__) from None

    def compose(self, delivery: Delivery, contact: Contact) -> tuple[dict[str, str], bytes]:
        """Headers and body of the request, signed if the contact has a secret. Raises NotDelivered (WEBHOOK_SECRET_INVALID)."""
        content = load(delivery.channel, delivery.content)
        assert isinstance(content, Content)  # the channel's own
        attributes: dict[str, object] = {
            "id": str(delivery.delivery_id),
            "source": f"{self._source}/{delivery.tenant}",
            "type": content.type,
            "time": delivery.created_at,
            "datacontenttype": "application/json",
        }
        if content.subject:
            attributes["subject"] = content.subject
        if delivery.traceparent:
            attributes["traceparent"] = delivery.traceparent
        event = CloudEvent(attributes, dict(content.data))
        message = (to_binary if contact.mode == "binary" else to_structured)(event, JSONFormat())
        sent_at = self._clock()
        message_id = str(delivery.delivery_id)
        headers = {
            **message.headers,
            "webhook-id": message_id,
            "webhook-timestamp": str(int(sent_at.timestamp())),
            "user-agent": "foldline",
        }
        if contact.secret is not None:
            headers["webhook-signature"] = _signer(contact.secret).sign(message_id, sent_at, message.body.decode())
        return headers, message.body

    async def _post(self, url: httpx.URL, headers: dict[str, str], body: bytes) -> None:
        address = await self._public_address(url)
        host = url.host if url.port is None else f"{url.host}:{url.port}"
        timeout = httpx.Timeout(self._timeout_s, connect=CONNECT_TIMEOUT_S)
        request = {"headers": {**headers, "host": host}, "content": body, "extensions": {"sni_hostname": url.host}}
        # No proxy of the environment: it would look the name up once more.
        async with (
            httpx.AsyncClient(verify=self._tls_context, follow_redirects=False, trust_env=False, timeout=timeout) as client,
            client.stream("POST", url.copy_with(host=address), **request) as response,  # type: ignore[arg-type]
        ):
            await _judge(response)

    async def _public_address(self, url: httpx.URL) -> str:
        """An address of the host, after all its addresses were checked. Raises NotDelivered."""
        if url.scheme not in ("https", "http") or not url.host or url.userinfo:
            raise NotDelivered("WEBHOOK_URL_INVALID", final=True)
        if url.scheme == "http" and not self._allow_plain:
            raise NotDelivered("WEBHOOK_NOT_HTTPS", final=True)
        try:
            found = await asyncio.get_running_loop().getaddrinfo(
                url.host, url.port or (443 if url.scheme == "https" else 80), type=socket.SOCK_STREAM
            )
        except OSError as error:
            raise NotDelivered("WEBHOOK_HOST_UNKNOWN", type(error).__name__) from None
        addresses = [str(each[4][0]) for each in found]
        if not self._allow_private and not all(is_public(address) for address in addresses):
            raise NotDelivered("WEBHOOK_ADDRESS_PRIVATE", "the host has an address that is not public", final=True)
        return addresses[0]


def _signer(secret: SecretStr) -> Signer:
    try:
        return Signer(secret.get_secret_value())
    except (ValueError, EmptyWebhookSecretError):
        # Our own contacts' file is wrong: when it is mended, the message should still be sent.
        raise NotDelivered("WEBHOOK_SECRET_INVALID") from None


async def _judge(response: httpx.Response) -> None:
    """Reads a little of the answer, so that the connection closes cleanly. Raises NotDelivered unless the status is 2xx."""
    read = 0
    async for part in response.aiter_raw():
        read += len(part)
        if read > ANSWER_BYTES_MAX:
            break
    status = response.status_code
    if 200 <= status < 300:
        return
    if 300 <= status < 400:
        raise NotDelivered("WEBHOOK_REDIRECTED", str(status))
    # 410 Gone: the receiver does not want such messages any more.
    raise NotDelivered("WEBHOOK_REFUSED", str(status), final=status == 410, retry_after_s=_retry_after_s(response))


def _retry_after_s(response: httpx.Response) -> float:
    """The pause that the receiver asks for, given as seconds or as a date; at most an hour."""
    value = response.headers.get("retry-after", "")
    if value.isdecimal():
        return min(float(value), 3600.0)
    try:
        asked_s = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError):
        return 0.0
    return min(max(asked_s, 0.0), 3600.0)

"""How NATS is reached: its servers, TLS, credentials, and a connection that never gives up."""

from __future__ import annotations

import asyncio
import binascii
import ssl
import time
from base64 import b32decode, b64encode
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nats import errors
from nats.aio.client import DEFAULT_BUFFER_SIZE, Client, Srv
from nats.aio.transport import TcpTransport
from nats.errors import UnexpectedEOF

from shared.platform.cancellation import heed_cancellation
from shared.platform.certificates import Tls, TlsFiles
from shared.platform.peers import BrokerPeer
from shared.platform.telemetry import logger
from shared.platform.versions import nats_too_old

REPEAT_LOG_S = 10.0
CLOSE_S = 1.0
"""How long a connection that is given up may take to close."""

log = logger(__name__)


@dataclass(frozen=True, slots=True)
class Broker:
    """The servers of a NATS, by one or several URLs separated by commas, and how to be let in."""

    url: str
    tls: TlsFiles = field(default_factory=TlsFiles)
    credentials_file: Path | None = None

    @staticmethod
    def of(settings: BrokerPeer) -> Broker:
        """What the settings say."""
        return Broker(settings.nats_url.get_secret_value(), settings.nats_tls, settings.nats_credentials_file)


class BrokerTooOld(Exception):
    """The NATS server is of a version that cannot hold the stream."""


class NotOverTls(errors.Error):
    """A server that is to be reached over TLS offers none."""


class _Transport(TcpTransport):
    """Closes within `CLOSE_S`.

    After a TLS handshake that failed, nats-py would wait for ever for the connection to close (seen in 2.16): its end is told
    to the handshake, and not to the stream that is waited for.
    """

    async def wait_closed(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await super().wait_closed()  # type: ignore[no-untyped-call]


class _Client(Client):
    """Reads its certificates again for a new connection, and tells a server nothing in plain text that must speak TLS.

    nats-py goes on in plain text, user and password included, if the server does not ask for TLS, even where the URL begins
    with tls:// (seen in 2.16): whoever sits in between could have it so.

    It connects to the servers of the setting alone. Others that a server names are ignored, because it names them before the
    TLS handshake, when nobody knows yet who it is.
    """

    def __init__(self, tls: TlsFiles) -> None:
        super().__init__()
        self._files = tls
        self._used: tuple[Tls, ssl.SSLContext] | None = None

    @property
    def ssl_context(self) -> ssl.SSLContext:
        tls = self._files.current()
        if self._used is None or self._used[0] is not tls:
            self._used = tls, _context(tls, self._files)
        return self._used[1]

    def _connect_command(self) -> bytes:
        server = self._current_server
        if server is not None and server.uri.scheme == "tls" and not self._server_info.get("tls_required"):
            raise NotOverTls("nats: the server offers no TLS, and its URL begins with tls://")
        return super()._connect_command()

    async def _connect_to_server(self, s: Srv) -> None:
        # The transport is chosen in here, so this replaces the method of nats-py, for TCP alone.
        s.last_attempt = time.monotonic()
        self._transport = _Transport()  # type: ignore[no-untyped-call]
        await self._transport.connect(s.uri, DEFAULT_BUFFER_SIZE, self.options["connect_timeout"])
        heed_cancellation()

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        known = {name: value for name, value in info.items() if name != "connect_urls"}
        await super()._process_info(known, initial_connection)


def _context(tls: Tls, files: TlsFiles) -> ssl.SSLContext:
    # Text between the certificates may be of any kind; OpenSSL takes ASCII.
    authorities = None if tls.authorities is None else tls.authorities.decode("ascii", "ignore")
    context = ssl.create_default_context(cadata=authorities)
    if files.cert_file is not None:
        context.load_cert_chain(files.cert_file, files.key_file)
    return context


class Credentials:
    """A NATS user's credentials in a file as `nsc` makes it. It is read for every connection."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def jwt(self) -> bytes:
        """The user's JWT. Raises OSError, or errors.Error if there is none."""
        return self._part("NATS USER JWT")

    def sign(self, nonce: str) -> bytes:
        """The server's nonce, signed by the user's key, in base64. Raises OSError, or errors.Error if there is no key."""
        # The package `nkeys` is published as source alone, which an installation by wheels cannot take.
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415

        seed = self._part("USER NKEY SEED")
        try:
            raw = b32decode(seed + b"=" * (-len(seed) % 8))
        except binascii.Error:
            raw = b""
        # Two bytes say that it is the seed of a user, then come the 32 of the key, and a checksum.
        if len(raw) != 36 or raw[0] & 0xF8 != _SEED or (raw[0] & 7) << 5 | (raw[1] & 0xF8) >> 3 != _USER:
            raise errors.Error(f"nats: {self._file} holds no seed of a user")
        if binascii.crc_hqx(raw[:-2], 0) != int.from_bytes(raw[-2:], "little"):
            raise errors.Error(f"nats: the seed in {self._file} is damaged")
        return b64encode(Ed25519PrivateKey.from_private_bytes(raw[2:34]).sign(nonce.encode()))

    def _part(self, title: str) -> bytes:
        lines = iter(self._file.read_text(errors="replace").splitlines())
        for line in lines:
            if f"BEGIN {title}" in line:
                return next(lines, "").strip().encode()
        raise errors.Error(f"nats: {self._file} holds no {title}")


_SEED, _USER = 18 << 3, 20 << 3


async def connect(broker: Broker, name: str) -> Client:
    """A connection that never gives up. If there is no server yet, it logs that and waits.

    Raises ValueError for certificates that cannot be used.

    - `max_reconnect_attempts=-1`: the default gives up for ever after a minute.
    - `pending_size=-1`: while disconnected a publish raises at once instead of piling up in memory, to be sent later
      by a relay that may no longer lead.
    - `error_cb`: a missing permission shows nowhere else.

    `stats["reconnects"]` of the client counts reconnects; after each, messages may be missing.
    """
    client = _Client(broker.tls)
    signed = None if broker.credentials_file is None else Credentials(broker.credentials_file)
    told_at = 0.0

    async def on_error(error: Exception) -> None:
        nonlocal told_at
        heed_cancellation()  # nats-py is about to try again
        if isinstance(error, UnexpectedEOF | OSError | TimeoutError | NotOverTls):  # repeated at every attempt
            if time.monotonic() - told_at < REPEAT_LOG_S:
                return
            told_at = time.monotonic()
            log.info("broker_awaited", connection=name, error=repr(error))
        else:
            log.warning("broker_error", connection=name, error=repr(error))

    async def on_disconnect() -> None:
        if not client.is_closed:
            log.warning("broker_lost", connection=name)

    async def on_reconnect() -> None:
        nonlocal told_at
        told_at = 0.0
        log.info("broker_back", connection=name)

    await client.connect(
        [one.strip() for one in broker.url.split(",")],
        name=name,
        allow_reconnect=True,
        max_reconnect_attempts=-1,
        reconnect_time_wait=1,
        connect_timeout=2,
        ping_interval=5,
        max_outstanding_pings=2,
        pending_size=-1,
        error_cb=on_error,
        disconnected_cb=on_disconnect,
        reconnected_cb=on_reconnect,
        user_jwt_cb=None if signed is None else signed.jwt,
        signature_cb=None if signed is None else signed.sign,
    )
    log.info("broker_connected", connection=name)
    return client


def refuse_old(client: Client) -> None:
    """Raises BrokerTooOld if the server to which the client is connected cannot hold the stream.

    For the relay alone: consumers need no stream, and go on without any broker. A server whose version is no number is not
    refused for it, nor is one that is away: nats-py then tells 0.0.
    """
    try:
        version = client.connected_server_version
        numbers = version.major, version.minor
    except ValueError:
        return
    if any(numbers) and (too_old := nats_too_old(*numbers)):
        raise BrokerTooOld(too_old)

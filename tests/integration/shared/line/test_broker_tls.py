"""NATS over TLS: which servers are spoken to, client certificates, credentials, and several servers in one setting."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from nats import errors

from deploy.engines.nats import Nats
from shared.line.broker_access import Broker, Credentials, connect
from shared.platform import telemetry
from shared.platform.certificates import TlsFiles
from tests.support.system.authority import Authority
from tests.support.system.tls_engines import TlsNats, tls
from tests.support.system.waiting import eventually

YEAR = timedelta(days=365)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """Whom servers and clients trust."""
    return Authority(tmp_path)


@pytest.fixture
def log() -> io.BytesIO:
    """The log of the test."""
    stream = io.BytesIO()
    telemetry.configure("info", service="test", stream=stream)
    return stream


@asynccontextmanager
async def running(nats: TlsNats) -> AsyncIterator[TlsNats]:
    """Runs a server."""
    await asyncio.to_thread(nats.start)
    try:
        yield nats
    finally:
        nats.destroy()


async def reached(broker: Broker) -> bool:
    """Whether a connection comes about and carries a message."""
    client = await asyncio.wait_for(connect(broker, "test"), 10)
    try:
        await client.flush(5)
        return bool(client.is_connected)
    finally:
        await client.close()


async def trouble(broker: Broker, log: io.BytesIO) -> str:
    """What the log says of a server that is not reached, which is asked again and again."""
    log.seek(0)
    log.truncate()
    connecting = asyncio.create_task(connect(broker, "test"))

    def told() -> list[dict[str, Any]]:
        lines = map(json.loads, log.getvalue().splitlines())
        return [line for line in lines if line["event"] in ("broker_awaited", "broker_error")]

    try:
        await eventually(told, 10)
        assert not connecting.done()
        return str(told()[0]["error"])
    finally:
        connecting.cancel()
        await asyncio.gather(connecting, return_exceptions=True)


async def let_nobody_in(broker: Broker, log: io.BytesIO) -> None:
    """Waits until the server's refusal is in the log: at times the client sees the end of the connection before it."""

    async def refused() -> bool:
        found = await trouble(broker, log)
        assert "Authorization" in found or "ConnectionReset" in found
        return "Authorization" in found

    await eventually(refused, 20)


async def test_only_the_server_that_was_meant_is_spoken_to(authority: Authority, tmp_path: Path, log: io.BytesIO) -> None:
    """With its authority a connection comes about, whatever text its file has; a foreign one and another host are refused."""
    async with running(TlsNats(tmp_path / "nats", tls(authority.issue()))) as nats:
        assert await reached(Broker(nats.over_tls(), TlsFiles(authority.ca)))
        bundle = tmp_path / "bundle.pem"
        bundle.write_bytes("# Főtanúsítvány\n".encode() + authority.ca.read_bytes())
        assert await reached(Broker(nats.over_tls(), TlsFiles(bundle)))
        foreign = Authority(tmp_path, "foreign")
        assert "certificate verify failed" in await trouble(Broker(nats.over_tls(), TlsFiles(foreign.ca)), log)
        assert "certificate verify failed" in await trouble(Broker(nats.over_tls()), log)
        assert "IP address mismatch" in await trouble(Broker(nats.over_tls("127.0.0.1"), TlsFiles(authority.ca)), log)


@pytest.mark.parametrize(("begins_in", "why"), [(-YEAR, "certificate has expired"), (YEAR, "certificate is not yet valid")])
async def test_an_untimely_certificate_is_refused_until_it_is_renewed(
    authority: Authority, tmp_path: Path, log: io.BytesIO, begins_in: timedelta, why: str
) -> None:
    """A connection that waits comes about as soon as the server has a good one."""
    async with running(TlsNats(tmp_path / "nats", tls(authority.issue(begins_in=begins_in)))) as nats:
        broker = Broker(nats.over_tls(), TlsFiles(authority.ca))
        assert why in await trouble(broker, log)
        nats.kill()
        authority.issue()
        await asyncio.to_thread(nats.start)
        assert await reached(broker)


async def test_a_server_that_offers_no_tls_learns_no_password(nats_server: Nats, log: io.BytesIO) -> None:
    """nats-py would go on in plain text, whatever the URL says."""
    url = nats_server.url.replace("nats://", "tls://")
    assert "offers no TLS" in await trouble(Broker(url), log)


async def test_a_client_certificate_is_shown_and_renewed_with_the_next_connection(
    authority: Authority, tmp_path: Path, log: io.BytesIO
) -> None:
    """Without one the server hangs up. A connection that lives long shows the present one when it is made anew."""
    mine = authority.issue("client")
    async with running(TlsNats(tmp_path / "nats", tls(authority.issue(), authority.ca))) as nats:
        assert await trouble(Broker(nats.over_tls(), TlsFiles(authority.ca)), log)
        client = await connect(Broker(nats.over_tls(), TlsFiles(authority.ca, mine.cert, mine.key)), "test")
        try:
            nats.kill()
            other = Authority(tmp_path, "other")
            authority_file, new, server = authority.ca, other.issue("client"), other.issue()
            for old, fresh in (
                (authority_file, other.ca),
                (mine.cert, new.cert),
                (mine.key, new.key),
                (authority.folder / "server.pem", server.cert),
                (authority.folder / "server.key", server.key),
            ):
                old.write_bytes(fresh.read_bytes())
            await asyncio.to_thread(nats.start)
            await eventually(lambda: client.is_connected and client.stats["reconnects"] > 0, 20)
            await client.flush(5)
        finally:
            await client.close()


async def test_several_servers_may_be_named(nats_server: Nats, tmp_path: Path, log: io.BytesIO) -> None:
    """One that is down is passed over."""
    down = Nats(tmp_path / "down")
    down.start()
    down_url = down.url
    down.destroy()
    assert await reached(Broker(f"{down_url}, {nats_server.url}"))
    assert await reached(Broker(f"{nats_server.url},{down_url}"))


async def greet(info: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    """Says what a NATS server says first, with `info` in it."""
    said = {"server_id": "S", "version": "2.12.0", "max_payload": 1_048_576, "proto": 1, **info}
    writer.write(f"INFO {json.dumps(said)}\r\n".encode())
    await writer.drain()


async def test_a_server_that_hangs_up_in_the_first_handshake_is_tried_again(
    authority: Authority, tmp_path: Path, log: io.BytesIO
) -> None:
    """As one does that is just starting or ending behind a load balancer."""

    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await greet({"tls_required": True}, writer)
        writer.close()

    async with running(TlsNats(tmp_path / "nats", tls(authority.issue()))) as nats:
        broker = Broker(nats.over_tls(), TlsFiles(authority.ca))
        nats.kill()
        async with await asyncio.start_server(hang_up, "localhost", urlsplit(broker.url).port) as rude:
            connecting = asyncio.create_task(connect(broker, "test"))
            await eventually(lambda: b"broker_awaited" in log.getvalue(), 10)
            rude.close()
        await asyncio.to_thread(nats.start)
        try:
            client = await asyncio.wait_for(connecting, 10)
            await client.flush(5)
        finally:
            connecting.cancel()
        await client.close()


async def test_servers_that_a_server_names_are_not_connected_to() -> None:
    """Neither those that it names before the handshake, nor later ones."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await greet({"connect_urls": ["198.51.100.1:4222"]}, writer)
        while line := await reader.readline():
            if line == b"PING\r\n":
                writer.write(b"PONG\r\n")
                await greet({"connect_urls": ["198.51.100.2:4222"]}, writer)
        writer.close()

    async with await asyncio.start_server(serve, "localhost", 0) as server:
        port = server.sockets[0].getsockname()[1]
        client = await asyncio.wait_for(connect(Broker(f"nats://localhost:{port}"), "test"), 10)
        await client.flush(5)
        await client.flush(5)  # what the server said after its first answer has been read now
        assert [one.netloc for one in client.servers] == [f"localhost:{port}"]
        await client.close()


class Nkey:
    """A key pair as NATS writes it."""

    def __init__(self, prefix: int) -> None:
        self._prefix = prefix << 3
        self._key = Ed25519PrivateKey.generate()

    @property
    def public(self) -> str:
        """The public key's name."""
        raw = self._key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        return _checked(bytes([self._prefix]) + raw)

    @property
    def seed(self) -> str:
        """The private key."""
        raw = self._key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
        return _checked(bytes([18 << 3 | self._prefix >> 5, (self._prefix & 31) << 3]) + raw)

    def vouch(self, subject: str, kind: str, **claims: Any) -> str:
        """A JWT in which this key says something of another."""
        said = {
            "jti": subject,
            "iat": int(time.time()),
            "iss": self.public,
            "name": kind,
            "sub": subject,
            "nats": {"type": kind, "version": 2, **claims},
        }
        text = ".".join(_base64(json.dumps(part).encode()) for part in ({"typ": "JWT", "alg": "ed25519-nkey"}, said))
        return f"{text}.{_base64(self._key.sign(text.encode()))}"


def _checked(raw: bytes) -> str:
    return base64.b32encode(raw + binascii.crc_hqx(raw, 0).to_bytes(2, "little")).decode().rstrip("=")


def _base64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


OPERATOR, ACCOUNT, USER = 14, 0, 20
UNLIMITED = {"subs": -1, "data": -1, "payload": -1}


async def test_credentials_in_a_file_let_in_and_are_read_for_every_connection(tmp_path: Path, log: io.BytesIO) -> None:
    """A user of a NATS with accounts, whose file is renewed; without the file, or with a stranger's, nobody is let in."""
    operator, account, user = Nkey(OPERATOR), Nkey(ACCOUNT), Nkey(USER)
    limits = {**UNLIMITED, "imports": -1, "exports": -1, "wildcards": True, "conn": -1, "leaf": -1}
    known = operator.vouch(account.public, "account", limits=limits)

    def configuration(port: int, monitor_port: int) -> str:
        return (
            f'host: "127.0.0.1"\nport: {port}\nhttp: "127.0.0.1:{monitor_port}"\n'
            f"operator: {operator.vouch(operator.public, 'operator')}\n"
            f"resolver: MEMORY\nresolver_preload: {{ {account.public}: {known} }}\n"
        )

    file = tmp_path / "user.creds"

    def credentials(by: Nkey, of: Nkey) -> str:
        jwt = by.vouch(of.public, "user", **UNLIMITED)
        return (
            f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{of.seed}\n------END USER NKEY SEED------\n"
        )

    async with running(TlsNats(tmp_path / "nats", "", instead=configuration)) as nats:
        url = nats.url.split("@")[0].split("//")[0] + "//" + nats.url.split("@")[1]
        file.write_text(credentials(account, user))
        assert await reached(Broker(url, credentials_file=file))
        await let_nobody_in(Broker(url), log)
        file.write_text(credentials(Nkey(ACCOUNT), Nkey(USER)))
        await let_nobody_in(Broker(url, credentials_file=file), log)
        file.write_text(credentials(account, Nkey(USER)))
        assert await reached(Broker(url, credentials_file=file))


def test_a_file_without_a_users_key_is_told(tmp_path: Path) -> None:
    """By the file's name, without what is in it: nothing, no seed, another kind's, a damaged one."""
    file, seed = tmp_path / "user.creds", Nkey(USER).seed
    damaged = seed[:20] + ("A" if seed[20] != "A" else "B") + seed[21:]
    for content, why in (
        ("", "holds no USER NKEY SEED"),
        ("!", "holds no seed of a user"),
        (Nkey(ACCOUNT).seed, "holds no seed of a user"),
        (damaged, "is damaged"),
    ):
        file.write_text(f"-----BEGIN USER NKEY SEED-----\n{content}\n" if content else "")
        with pytest.raises(errors.Error, match=why) as told:
            Credentials(file).sign("nonce")
        assert len(content) < 2 or content not in str(told.value)

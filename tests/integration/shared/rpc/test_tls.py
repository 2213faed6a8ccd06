"""gRPC over TLS: who is let in, who is trusted, and certificates that are renewed while calls go on."""

from __future__ import annotations

import asyncio
import io
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from grpc import ChannelConnectivity, aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from shared.platform import telemetry
from shared.platform.certificates import TlsFiles
from shared.platform.settings import ProcessSettings
from shared.rpc.client import channel, connected
from shared.rpc.probes import LIVENESS, Probes
from shared.rpc.status import from_rpc_error
from tests.support.system.authority import Authority, replace
from tests.support.system.waiting import eventually

CHECK = health_pb2.HealthCheckRequest(service=LIVENESS)
YEAR = timedelta(days=365)


class Served:
    """A process that answers health over TLS, and its log."""

    def __init__(self, probes: Probes, log: io.BytesIO) -> None:
        self.probes = probes
        self._log = log

    def lines(self, event: str) -> list[dict[str, Any]]:
        """The lines of the log for an event."""
        return [line for line in map(json.loads, self._log.getvalue().splitlines()) if line["event"] == event]

    def through(self, tls: TlsFiles, scheme: str = "grpcs://", host: str = "localhost") -> aio.Channel:
        """A channel to it."""
        return channel(f"{scheme}{host}:{self.probes.port}", retries=False, tls=tls)

    async def refusal(self, tls: TlsFiles, scheme: str = "grpcs://", host: str = "localhost") -> tuple[str, str]:
        """What a call over a channel of its own is refused with; empty if it is answered."""
        async with self.through(tls, scheme, host) as connection:
            try:
                await health_pb2_grpc.HealthStub(connection).Check(CHECK, timeout=5)
            except aio.AioRpcError as error:
                refusal = from_rpc_error(error)
                return refusal.reason, refusal.text
        return "", ""


@asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[Served]:
    """Serves gRPC health."""
    log = io.BytesIO()
    telemetry.configure("info", service="test", stream=log)
    probes = Probes(ProcessSettings(**settings), "test")
    async with probes.alone():
        yield Served(probes, log)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """Whom servers and clients of a test trust."""
    return Authority(tmp_path)


@pytest.fixture
def foreign(tmp_path: Path) -> Authority:
    """Another, whom nobody trusts."""
    return Authority(tmp_path, "foreign")


async def certificate_of(served: Served) -> bytes:
    """The certificate that a new connection is shown."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    _, writer = await asyncio.open_connection("127.0.0.1", served.probes.port, ssl=context)
    shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return bytes(shown)


async def shows_another(served: Served, than: bytes) -> bool:
    """Whether new connections are shown another certificate."""
    return await certificate_of(served) != than


async def test_a_server_that_cannot_be_trusted_is_refused_by_name(authority: Authority, foreign: Authority) -> None:
    """A foreign authority, another host, plain text: no call reaches it, and each is told apart."""
    files = authority.issue()
    async with serving(tls_cert_file=files.cert, tls_key_file=files.key) as served:
        assert await served.refusal(TlsFiles(authority.ca)) == ("", "")
        assert await served.refusal(TlsFiles(foreign.ca)) == (
            "CERTIFICATE_NOT_TRUSTED",
            "the certificate of the service is not trusted: unable to get local issuer certificate",
        )
        assert await served.refusal(TlsFiles()) == await served.refusal(TlsFiles(foreign.ca))
        assert await served.refusal(TlsFiles(authority.ca), host="127.0.0.1") == (
            "CERTIFICATE_NOT_TRUSTED",
            "the certificate of the service is not trusted: it is for another host",
        )
        assert (await served.refusal(TlsFiles(), scheme=""))[0] == "UNAVAILABLE"
        assert served.lines("listening_in_plain_text") == []


async def test_a_client_without_a_certificate_of_the_authority_is_not_let_in(authority: Authority, foreign: Authority) -> None:
    """None, a foreign one, and one that is no longer or not yet valid; with a good one every call is answered."""
    files, good, bad = authority.issue(), authority.issue("client"), foreign.issue("client")
    settings = {"tls_cert_file": files.cert, "tls_key_file": files.key, "tls_client_ca_file": authority.ca}
    async with serving(**settings) as served:
        assert await served.refusal(TlsFiles(authority.ca, good.cert, good.key)) == ("", "")
        assert (await served.refusal(TlsFiles(authority.ca)))[0] == "UNAVAILABLE"
        assert (await served.refusal(TlsFiles(authority.ca, bad.cert, bad.key)))[0] == "UNAVAILABLE"
    for begins_in, why in ((-YEAR, "expired at"), (YEAR, "is not valid before")):
        files = authority.issue("untimely", begins_in=begins_in)
        with pytest.raises(ValueError, match=why):
            channel("grpcs://localhost:1", tls=TlsFiles(authority.ca, files.cert, files.key))


async def test_a_renewed_certificate_is_served_and_no_stream_is_dropped(authority: Authority, foreign: Authority) -> None:
    """New connections are shown the new certificate, of another authority even; a stream that is open goes on."""
    files = authority.issue()
    async with (
        serving(tls_cert_file=files.cert, tls_key_file=files.key) as served,
        served.through(TlsFiles(authority.ca)) as held,
    ):
        watch = health_pb2_grpc.HealthStub(held).Watch(CHECK)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        first = await certificate_of(served)
        other = foreign.issue()
        replace(files.key, other.key.read_bytes())
        assert not await shows_another(served, first)  # it does not fit the certificate yet
        replace(files.cert, other.cert.read_bytes())

        async def scraped_and_shown() -> bool:
            await served.probes.metrics.render()  # it looks at the same files, and takes the change from nobody
            return await shows_another(served, first)

        await eventually(scraped_and_shown, 10)
        assert await served.refusal(TlsFiles(foreign.ca)) == ("", "")
        assert (await served.refusal(TlsFiles(authority.ca)))[0] == "CERTIFICATE_NOT_TRUSTED"
        await served.probes.servicer.set(LIVENESS, health_pb2.HealthCheckResponse.NOT_SERVING)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.mark.parametrize(
    ("begins_in", "why"), [(-YEAR, "expired at"), (YEAR, "is not valid before"), (None, "holds no certificate in PEM form")]
)
async def test_a_bad_renewal_leaves_the_last_good_certificate(
    authority: Authority, begins_in: timedelta | None, why: str
) -> None:
    """The log says once what is wrong, and the next good renewal is served."""
    files = authority.issue()
    async with serving(tls_cert_file=files.cert, tls_key_file=files.key) as served:
        first = await certificate_of(served)
        if begins_in is None:
            replace(files.cert, b"no certificate")
        else:
            authority.issue(begins_in=begins_in)

        async def told() -> bool:
            assert await certificate_of(served) == first
            return bool(served.lines("certificates_not_reloaded"))

        await eventually(told, 10)
        assert why in served.lines("certificates_not_reloaded")[-1]["error"]
        authority.issue()
        await eventually(lambda: shows_another(served, first), 10)


async def test_a_client_goes_on_when_its_certificate_is_renewed(authority: Authority, foreign: Authority) -> None:
    """A channel that lives long takes its new certificate, and the new authority, for the next call; a stream goes on."""
    files, mine = authority.issue(), authority.issue("client")
    settings = {"tls_cert_file": files.cert, "tls_key_file": files.key, "tls_client_ca_file": authority.ca}
    async with serving(**settings) as served, served.through(TlsFiles(authority.ca, mine.cert, mine.key)) as held:
        stub = health_pb2_grpc.HealthStub(held)
        watch = stub.Watch(CHECK)
        await watch.read()
        first = await certificate_of(served)
        other, others = foreign.issue(), foreign.issue("client")
        for file, new in ((mine.key, others.key), (mine.cert, others.cert), (files.key, other.key), (files.cert, other.cert)):
            replace(file, new.read_bytes())
        replace(authority.ca, foreign.ca.read_bytes())
        await eventually(lambda: shows_another(served, first), 10)
        assert (await served.refusal(TlsFiles(foreign.ca)))[0] == "UNAVAILABLE"
        assert await served.refusal(TlsFiles(foreign.ca, others.cert, others.key)) == ("", "")

        async def both_renewed() -> bool:
            await stub.Check(CHECK, timeout=5)
            return {line["what"] for line in served.lines("certificates_reloaded")} == {"server", "client"}

        await eventually(both_renewed, 10)
        await stub.Check(CHECK, timeout=5)
        await served.probes.servicer.set(LIVENESS, health_pb2.HealthCheckResponse.NOT_SERVING)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_a_channel_whose_certificate_ended_connects_with_the_new_one(authority: Authority, foreign: Authority) -> None:
    """Also who only asks whether it is connected, which `connected` does before a call."""
    files, mine = authority.issue(), authority.issue("client")
    settings = {"tls_cert_file": files.cert, "tls_key_file": files.key, "tls_client_ca_file": authority.ca}
    async with serving(**settings) as served, served.through(TlsFiles(authority.ca, mine.cert, mine.key)) as held:
        first = await certificate_of(served)
        other, others = foreign.issue(), foreign.issue("client")
        for file, new in ((mine.key, others.key), (mine.cert, others.cert), (files.key, other.key), (files.cert, other.cert)):
            replace(file, new.read_bytes())
        replace(authority.ca, foreign.ca.read_bytes())
        await eventually(lambda: shows_another(served, first), 10)
        await eventually(lambda: connected(held, 0.5), 20)
        assert held.get_state() is ChannelConnectivity.READY

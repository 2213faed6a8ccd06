"""The whole system with TLS on every connection: client certificates asked for, and renewed under load."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from grpc import aio

from deploy.bootstrap import bootstrap
from deploy.engines.child import free_port
from deploy.local.supervisor import Program
from deploy.local.system import PROJECTOR, READ, RELAY, SAGA, WRITE, System
from foldline.v1 import as_of_pb2
from shared.platform.certificates import TlsFiles
from shared.platform.identity import Role
from shared.rpc.client import channel
from tests.e2e.test_probes import page
from tests.e2e.test_time_travel import asked
from tests.support.checks.invariants import check, look
from tests.support.clients.bank import Bank
from tests.support.clients.steady import steady
from tests.support.system.authority import Authority
from tests.support.system.tls_engines import TlsNats, TlsPostgres, has_tls_postgres, tls
from tests.support.system.waiting import eventually

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not has_tls_postgres(), reason=f"no wheel of a PostgreSQL with TLS for {sys.platform}"),
]


ADDRESSES = {"WRITE": WRITE, "READ": READ, "SAGA": SAGA}
PROCESSES = (WRITE, RELAY, READ, PROJECTOR, SAGA)


class OverTls(System):
    """The system as production has it: no process starts unless all is over TLS."""

    def __init__(self, folder: Path, authority: Authority, postgres: TlsPostgres, nats: TlsNats) -> None:
        server, client = authority.issue("services"), authority.issue("clients")
        ports = {name: free_port() for name in (WRITE, READ, SAGA)}
        files = {
            "TLS_CERT_FILE": server.cert,
            "TLS_KEY_FILE": server.key,
            "TLS_CLIENT_CA_FILE": authority.ca,
            "CA_FILE": authority.ca,
            "CLIENT_CERT_FILE": client.cert,
            "CLIENT_KEY_FILE": client.key,
            "NATS_CA_FILE": authority.ca,
        }
        told = {f"FOLDLINE_{name}": str(file) for name, file in files.items()}
        self.called = told | {f"FOLDLINE_{name}_ADDRESS": f"grpcs://localhost:{ports[of]}" for name, of in ADDRESSES.items()}
        super().__init__(
            folder,
            bootstrap(postgres.verified(authority.ca), "over_tls"),
            nats.over_tls(),
            ports=ports,
            settings={**self.called, "FOLDLINE_TLS_REQUIRED": "true"},
        )
        self.postgres, self.nats = postgres, nats
        self.tls = TlsFiles(authority.ca, client.cert, client.key)
        self._authority = authority

    def channel(self, name: str) -> aio.Channel:
        """A channel to a program that serves gRPC, with a client's certificate."""
        return channel(f"grpcs://localhost:{self.programs[name].port}", retries=name != SAGA, tls=self.tls)

    def renew(self) -> None:
        """Replaces the certificates of services and clients."""
        self._authority.issue("services")
        self._authority.issue("clients")

    async def _serving(self, program: Program) -> bool:
        """By the admin port, as Kubernetes asks where gRPC is over TLS."""
        if not self.alive(program.name):
            return False
        try:
            status, _ = await page(program.admin_port, "/readyz")
        except OSError:
            return False
        return status == 200


@pytest.fixture
async def system(tmp_path: Path) -> AsyncIterator[OverTls]:
    """Everything up, over TLS."""
    authority = Authority(tmp_path)
    postgres = TlsPostgres(tmp_path / "postgres", authority)
    nats = TlsNats(tmp_path / "nats", tls(authority.issue("nats")))
    try:
        postgres.start()
        nats.start()
        system = OverTls(tmp_path / "system", authority, postgres, nats)
        try:
            await system.start_all()
            yield system
        finally:
            await system.stop_all()
    finally:
        nats.destroy()
        postgres.destroy()


async def test_money_moves_over_tls_while_certificates_are_renewed(system: OverTls) -> None:
    """No client sees an error when all certificates are replaced under load; processes that start then use the new ones."""
    for restarted in (False, True):
        async with system.channel(WRITE) as write, system.channel(READ) as read:
            bank = Bank(write, read, system.token(f"load-{restarted}".lower()))
            async with steady(bank) as clients:
                await clients.more(20)
                system.renew()
                await eventually(lambda: _renewed(system, WRITE), 10)
                await clients.more(40)
            assert clients.transfers
            # The read service, which calls the write service for that.
            alice, registered = await bank.register("Alice")
            then = as_of_pb2.AsOf(token=registered.consistency_token)
            assert (await asked(bank, "Get", "person", person_id=alice, as_of=then)).person.name == "Alice"
        for name in PROCESSES:
            assert await system.stop(name, 30) == 0, name
        await system.start_all()
    check(await look(system))
    for name in PROCESSES:
        assert "listening_over_tls" in _events(system, name)
        assert "listening_in_plain_text" not in _events(system, name)


async def test_the_command_line_calls_over_tls(system: OverTls) -> None:
    """By its variables; without them the reason is told."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("FOLDLINE_")}
    environment |= system.called | {"FOLDLINE_TOKEN": system.token("operators", "olga", [Role.OPERATOR, Role.READER])}

    async def status(given: dict[str, str]) -> tuple[int | None, str]:
        program = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "cli.main", "status", "-o", "json"),
            env=given,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        out, _ = await program.communicate()
        return program.returncode, out.decode()

    code, out = await status(environment)
    assert code == 0, out
    assert json.loads(out)
    code, out = await status({key: value for key, value in environment.items() if key != "FOLDLINE_CA_FILE"})
    assert code != 0
    assert "CERTIFICATE_NOT_TRUSTED" in out


def _renewed(system: OverTls, name: str) -> bool:
    return "certificates_reloaded" in _events(system, name)


def _events(system: OverTls, name: str) -> list[str]:
    return [json.loads(line)["event"] for line in system.log(name).read_text().splitlines() if line.startswith("{")]

"""The NATS servers of the overlay `production`, by the parts of nats-values.yaml that say who may connect to them."""

from __future__ import annotations

import io
import json
import re
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.engines.child import free_port, tail
from shared.line.broker_access import Broker
from shared.platform import telemetry
from shared.platform.certificates import TlsFiles
from tests.integration.shared.line.test_broker_tls import reached, trouble
from tests.support.system.authority import Authority, Files
from tests.support.system.tls_engines import TlsNats
from tests.support.system.waiting import eventually

ROOT = Path(__file__).parents[3]
VALUES = yaml.safe_load((ROOT / "deploy/kubernetes/overlays/production/nats-values.yaml").read_text())
WITHIN_S = 60.0


@dataclass(frozen=True, slots=True)
class Server:
    """A running server, and the port that it takes routes at."""

    name: str
    engine: TlsNats
    route_port: int
    monitor_port: int

    def peers(self) -> set[str]:
        """The names of the servers that it has a route to."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.monitor_port}/routez", timeout=5) as answer:
            return {route["remote_name"] for route in json.load(answer)["routes"]}

    def log(self) -> str:
        """What it wrote."""
        return tail(self.engine.log)


def tls_of(values: dict[str, Any], files: Files | None, authority: Authority) -> dict[str, Any]:
    """The block `tls` that the chart makes of such values: files of its secrets, and whatever is to be merged."""
    if not values["enabled"] or files is None:
        return {}
    assert values["secretName"] == VALUES["tlsCA"]["secretName"]
    assert VALUES["tlsCA"]["enabled"]
    made = {"cert_file": str(files.cert), "key_file": str(files.key), "ca_file": str(authority.ca)}
    return {"tls": made | values.get("merge", {})}


Start = Callable[[str, list[int], Files | None], Server]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """The one of the servers."""
    return Authority(tmp_path)


@pytest.fixture
def start(tmp_path: Path, authority: Authority) -> Iterator[Start]:
    """Starts servers, which are stopped behind the test: by a name, the ports they make routes to, and a certificate or none."""
    running: list[TlsNats] = []

    def started(name: str, routes: list[int], files: Files | None) -> Server:
        own = free_port()
        over = "nats" if files is None else "tls"
        cluster: dict[str, Any] = {
            "name": "nats",
            "listen": f"127.0.0.1:{own}",
            "no_advertise": True,
            "routes": [f"{over}://localhost:{port}" for port in [own, *routes]],
            **tls_of(VALUES["config"]["cluster"]["tls"], files, authority),
        }
        ports: list[int] = []

        def configured(port: int, monitor_port: int) -> str:
            ports[:] = [monitor_port]
            return json.dumps(
                {
                    "server_name": name,
                    "listen": f"127.0.0.1:{port}",
                    "http": f"127.0.0.1:{monitor_port}",
                    "cluster": cluster,
                    **tls_of(VALUES["config"]["nats"]["tls"], files, authority),
                }
            )

        engine = TlsNats(tmp_path / name, "", instead=configured)
        running.append(engine)
        engine.start()
        return Server(name, engine, own, ports[0])

    yield started
    for engine in running:
        engine.destroy()


def without(_: Authority, __: Authority) -> None:
    """A server that makes routes in plain text, as anybody could."""


def of_another_authority(_: Authority, foreign: Authority) -> Files:
    """A server whose certificate has the right name, from an authority that the servers do not trust."""
    return foreign.issue()


def of_a_service(authority: Authority, _: Authority) -> Files:
    """Who has a certificate of the servers' authority for another name than theirs, such as a process of Foldline taken over."""
    return authority.issue("service", "write")


@pytest.mark.parametrize(
    ("stranger", "refusal"),
    [
        (without, "first record does not look like a TLS handshake"),
        (of_another_authority, "TLS route handshake error"),
        (of_a_service, "rid:.*authentication error"),
    ],
)
async def test_only_servers_make_routes(
    stranger: Callable[[Authority, Authority], Files | None], refusal: str, start: Start, authority: Authority, tmp_path: Path
) -> None:
    """Two servers find each other; one without a server's certificate of their authority is refused by both."""
    files = authority.issue()
    first = start("first", [], files)
    start("stranger", [first.route_port], stranger(authority, Authority(tmp_path, "foreign")))
    await eventually(lambda: re.search(refusal, first.log()), WITHIN_S, every_s=0.1)
    second = start("second", [first.route_port], files)
    await eventually(lambda: first.peers() == {"second"} and second.peers() == {"first"}, WITHIN_S, every_s=0.1)


async def test_only_who_has_a_certificate_is_let_in(start: Start, authority: Authority) -> None:
    """A client of the authority, as Foldline's processes are; one that only trusts it is turned away."""
    log = io.BytesIO()
    telemetry.configure("info", service="test", stream=log)
    url = start("alone", [], authority.issue()).engine.over_tls()
    assert await trouble(Broker(url, TlsFiles(authority.ca)), log)
    mine = authority.issue("client", "write")
    assert await reached(Broker(url, TlsFiles(authority.ca, mine.cert, mine.key)))

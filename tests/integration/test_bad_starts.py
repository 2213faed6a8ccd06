"""A process that cannot start says why in one line and ends by itself; one that waits for what it needs ends when it is told."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from deploy.bootstrap import Databases
from deploy.engines.nats import Nats
from docs.generate import PROCESSES
from shared.platform.otel import release
from shared.platform.tokens import DevelopmentIssuer
from tests.support.system.forked import Program
from tests.support.system.proxy import Proxy
from tests.support.system.waiting import eventually

END_S = 60  # seconds, on a machine that is busy with other tests
NOWHERE = "127.0.0.1:1"
NEEDS = {
    "write_service": ("DATABASE_URL", "JWKS_FILE", "SEAL_KEYS"),
    "write_service.relay": ("DATABASE_URL", "NATS_URL"),
    "read_service": ("QUERY_DATABASE_URL", "JWKS_FILE", "SEAL_KEYS"),
    "read_service.projector": ("DATABASE_URL", "NATS_URL", "WRITE_ADDRESS", "TOKEN_FILE"),
    "saga_service": ("DATABASE_URL", "NATS_URL", "WRITE_ADDRESS", "TOKEN_FILE", "JWKS_FILE"),
}
ADDRESSES = {
    "DATABASE_URL": f"postgresql://app:swordfish@{NOWHERE}/x",
    "QUERY_DATABASE_URL": f"postgresql://app:swordfish@{NOWHERE}/x",
    "NATS_URL": f"nats://app:swordfish@{NOWHERE}",
    "WRITE_ADDRESS": NOWHERE,
}
SECRETS = {"FOLDLINE_DATABASE_URL", "FOLDLINE_QUERY_DATABASE_URL", "FOLDLINE_NATS_URL", "FOLDLINE_SEAL_KEYS"}
WAITS = ("waiting_for_database", "lease_waits_for_database", "broker_awaited")
Begin = Callable[[str, dict[str, str]], Program]


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Begin]:
    """Starts a process with all that it needs in settings, which lead nowhere unless they are given."""
    issuer = DevelopmentIssuer(tmp_path / "keys")
    (tmp_path / "token").write_text("swordfish")
    known = ADDRESSES | {
        "TOKEN_FILE": str(tmp_path / "token"),
        "JWKS_FILE": str(issuer.jwks_file),
        "SEAL_KEYS": "5eed" * 16,
    }
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("FOLDLINE_", "OTEL_"))}
    with ExitStack() as begun:

        def started(module: str, settings: dict[str, str]) -> Program:
            told = {name: known[name] for name in NEEDS[module]} | settings
            folder = tmp_path / f"{module}-{len(list(tmp_path.iterdir()))}"
            folder.mkdir()
            environment = outside | {f"FOLDLINE_{name}": value for name, value in told.items()}
            program = Program(module, cwd=tmp_path, env=environment, folder=folder)
            begun.callback(program.kill)
            return program

        yield started


def lines_of(program: Program) -> list[dict[str, Any]]:
    """Its log. Each line must be JSON, and nothing is said beside it, but by gRPC of an address that is taken."""
    assert all("add_port.cc" in line for line in program.complained.splitlines()), program.complained
    return [json.loads(line) for line in program.printed.splitlines()]


class OldPostgres(Proxy):
    """Says that the server behind it is PostgreSQL 15."""

    def answer(self, data: bytes) -> bytes:
        """The server tells its version when a connection begins."""
        return re.sub(rb"(?<=server_version\x00)\d\d", b"15", data)


@asynccontextmanager
async def old_nats() -> AsyncIterator[str]:
    """A URL of a server that greets as NATS 2.9 does."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        greeting = {"server_id": "x", "version": "2.9.10", "proto": 1, "max_payload": 1048576, "headers": True, "jetstream": True}
        writer.write(b"INFO " + json.dumps(greeting).encode() + b"\r\n")
        while line := await reader.readline():
            if line.startswith(b"PING"):
                writer.write(b"PONG\r\n")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def with_option(url: str, setting: str) -> str:
    """The URL of a database, in whose sessions a setting of PostgreSQL is this one."""
    return f"{url}?options=-c%20{setting.replace('=', '%3D')}"


ISOLATION, DURABILITY = "default_transaction_isolation=serializable", "synchronous_commit=off"
OLD = "POSTGRES_TOO_OLD: this is PostgreSQL 15, and 17 or newer is needed"
BAD = {
    "write_service": {
        "JWKS_FILE=/not/there": "FOLDLINE_JWKS_FILE: /not/there cannot be read: No such file",
        "LISTEN=taken": "cannot be listened on: it is taken, or not this machine's",
        "DATABASE_URL=write owner": "the role may write",
        f"DATABASE_URL=write app {ISOLATION}": ISOLATION,
        "DATABASE_URL=write app old": OLD,
    },
    "write_service.relay": {
        "ADMIN_LISTEN=taken": "cannot be listened on: error while attempting to bind",
        "DATABASE_URL=write owner": "the role may write",
        f"DATABASE_URL=write app {DURABILITY}": DURABILITY,
        "DATABASE_URL=write app old": OLD,
        "NATS_URL=nats 2.9": "NATS_TOO_OLD: this is NATS 2.9, and 2.11 or newer is needed",
    },
    "read_service": {
        "QUERY_DATABASE_URL=read app": "the role may write",
        f"QUERY_DATABASE_URL=read query {ISOLATION}": ISOLATION,
        "QUERY_DATABASE_URL=read query old": OLD,
    },
    "read_service.projector": {
        "DATABASE_URL=read admin": "the role is a superuser",
        f"DATABASE_URL=read app {DURABILITY}": DURABILITY,
        "DATABASE_URL=read app old": OLD,
    },
    "saga_service": {
        "DATABASE_URL=saga admin": "the role is a superuser",
        f"DATABASE_URL=saga app {ISOLATION}": ISOLATION,
        "DATABASE_URL=saga app old": OLD,
    },
}
"""What is told of one setting, and what the process says of it."""


async def setting(value: str, databases: Databases, held: AsyncExitStack) -> str:
    """What a word of `BAD` stands for. What serves it is held."""
    if value == "taken":
        listening = held.enter_context(socket.create_server(("127.0.0.1", 0)))
        return f"127.0.0.1:{listening.getsockname()[1]}"
    if value == "nats 2.9":
        return await held.enter_async_context(old_nats())
    service, *rest = value.split(" ")
    if not rest:
        return value
    role, *more = rest
    url = str(getattr(getattr(databases, service), role))
    if more == ["old"]:
        return (await held.enter_async_context(OldPostgres(url).serving())).url
    return with_option(url, more[0]) if more else url


@pytest.mark.parametrize("module", BAD)
async def test_what_cannot_be_used_is_one_line_and_exit_code_1(
    module: str, begin: Begin, databases: Databases, nats_server: Nats
) -> None:
    """It does not live on, silent and deaf to SIGTERM, because something that it opened never ends."""
    good = {"write_service": {"DATABASE_URL": databases.write.app}}
    good["write_service.relay"] = {**good["write_service"], "NATS_URL": nats_server.url}
    async with AsyncExitStack() as held:
        programs = {}
        for told in BAD[module]:
            name, _, value = told.partition("=")
            programs[told] = begin(module, good.get(module, {}) | {name: await setting(value, databases, held)})
        ends = {told: await asyncio.to_thread(program.wait, END_S) for told, program in programs.items()}
    assert ends == dict.fromkeys(BAD[module], 1)
    for told, program in programs.items():
        refusals = [line["error"] for line in lines_of(program) if line["event"] == "process_refuses_to_run"]
        assert [BAD[module][told] in refusal for refusal in refusals] == [True], (told, refusals)
        assert "Traceback" not in program.printed
        for database in (databases.write, databases.read, databases.saga):
            urls = [urlsplit(url) for url in (database.admin, database.owner, database.app, database.query) if url]
            assert not any(str(url.password) in program.printed for url in urls)


@asynccontextmanager
async def deaf() -> AsyncIterator[tuple[str, asyncio.Event]]:
    """A server that takes connections and never says a word: its address, and what is set when there was one."""
    came = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.set()
        while await reader.read(1024):
            pass
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", came


async def test_a_start_that_waits_ends_when_it_is_told(begin: Begin) -> None:
    """SIGTERM while nobody listens where it looks, or nobody answers: code 0. It began with its version and settings."""
    assert set(NEEDS) == set(PROCESSES)
    pairs = []
    async with AsyncExitStack() as held:
        for module, needed in NEEDS.items():
            address, came = await held.enter_async_context(deaf())
            told = {name: url.replace(NOWHERE, address) for name, url in ADDRESSES.items() if name in needed}
            pairs.append((begin(module, {}), begin(module, told), came))
        for away, stuck, came in pairs:
            await eventually(lambda: any(word in away.printed for word in WAITS), END_S)  # noqa: B023 (called at once)
            away.terminate()
            await asyncio.wait_for(came.wait(), END_S)
            stuck.terminate()
        programs = [program for away, stuck, _ in pairs for program in (away, stuck)]
        ends = [await asyncio.to_thread(program.wait, END_S) for program in programs]
    assert ends == [0] * len(programs)
    for program in programs:
        first, *_ = lines_of(program)
        assert (first["event"], first["version"]) == ("process_starts", release())
        settings = first["settings"]
        assert {settings[name] for name in settings.keys() & SECRETS} == {"**********"}
        assert settings["FOLDLINE_LOG_LEVEL"] == "info"
        assert "swordfish" not in program.printed


async def test_a_start_is_ended_at_any_moment(begin: Begin, databases: Databases) -> None:
    """By SIGTERM: before it listens to signals as any program, after that with code 0; it leaves no complaint."""
    programs = []
    for _ in range(8):
        programs.append(begin("write_service", {"DATABASE_URL": databases.write.app}))
        await asyncio.sleep(0.05)  # the moments: no condition is waited for
    for program in programs:
        program.terminate()
    for program in programs:
        code = await asyncio.to_thread(program.wait, END_S)
        assert code in ((0,) if "listening" in program.printed else (0, -signal.SIGTERM))
        assert not [line for line in lines_of(program) if line["level"] in ("warning", "error")]

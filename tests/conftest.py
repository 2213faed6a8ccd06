"""Fixtures for every test. The engines are real: they start in less than a second, once for each worker."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import hypothesis
import pytest

from deploy.bootstrap import Database, Databases
from deploy.engines.nats import Nats
from shared.platform import telemetry
from shared.rpc.held import hold_grpc
from tests.support.system.engines import Engines
from tests.support.system.mail import Mailbox, serving
from tests.support.system.stack import Stack

# How long an example takes says something of the machine, and nothing of the code.
hypothesis.settings.register_profile("foldline", deadline=None)
hypothesis.settings.load_profile("foldline")

MEMORY = Path("/dev/shm")  # noqa: S108 (pytest makes a folder there that is the user's own)
ROOM = 4 << 30
# What is kept for a restart would else grow to 1 GiB for each server.
SMALL_LOG = {"max_wal_size": "256MB"}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Takes the number of random faults, in fifties: a night can do more than the thousand of `make test-faults`."""
    parser.addoption("--random-faults", type=int, default=1000, metavar="N", help="how many random faults leaders meet (1000)")


def pytest_configure(config: pytest.Config) -> None:
    """Keeps what tests write in memory if 4 GiB are free for it; else, or where a place is named, on the disk.

    Tests make and delete databases by the thousand, which costs ten times as much on a disk. They claim no less: the engines sync
    as ever, and what is killed is a process, whose files outlive it.
    """
    if config.option.markexpr == "containers":  # images are large
        return
    if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= ROOM:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))
        for lock in MEMORY.glob("pytest-of-*/pytest-*/.lock"):  # of a run that was killed
            with contextlib.suppress(OSError, ValueError):
                if not Path("/proc", str(int(lock.read_text()))).exists():
                    shutil.rmtree(lock.parent)


@pytest.fixture(autouse=True, scope="session")
def held_grpc() -> None:
    """Tests make and drop channels and servers, some in the midst of a call, for as long as the worker lives."""
    hold_grpc()


@pytest.fixture(autouse=True)
def plain_logs() -> Iterator[None]:
    """A test that sets up logging as a process does leaves no trace of it for the next."""
    yield
    telemetry.divert(telemetry.Unconfigured())


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """PostgreSQL and NATS for all tests of this worker. A test that stops or kills one takes `private_engines`."""
    engines = Engines(tmp_path_factory.mktemp("engines"), settings=SMALL_LOG)
    try:
        engines.start()
        yield engines
    finally:
        engines.stop()


@pytest.fixture
def private_engines(tmp_path: Path) -> Iterator[Engines]:
    """Engines for one test alone, to be stopped, killed and started again; they keep their ports."""
    engines = Engines(tmp_path / "engines", settings=SMALL_LOG)
    try:
        engines.start()
        yield engines
    finally:
        engines.stop()


@pytest.fixture
def nats_server(tmp_path: Path) -> Iterator[Nats]:
    """A NATS server for one test alone, without streams; it starts in less than 0.1 s, and may be killed."""
    server = Nats(tmp_path / "nats")
    try:
        server.start()
        yield server
    finally:
        server.destroy()


@pytest.fixture
def write_db(engines: Engines) -> Iterator[Database]:
    """A fresh write database with its URLs."""
    database = engines.clone("write")
    yield database
    engines.drop(database)


@pytest.fixture
def read_db(engines: Engines) -> Iterator[Database]:
    """A fresh read database with its URLs."""
    database = engines.clone("read")
    yield database
    engines.drop(database)


@pytest.fixture
def saga_db(engines: Engines) -> Iterator[Database]:
    """A fresh saga database with its URLs."""
    database = engines.clone("saga")
    yield database
    engines.drop(database)


@pytest.fixture
def databases(engines: Engines) -> Iterator[Databases]:
    """Fresh databases of all services."""
    databases = engines.databases()
    yield databases
    engines.drop(databases.write)
    engines.drop(databases.read)
    engines.drop(databases.saga)


@pytest.fixture
def mailbox() -> Iterator[Mailbox]:
    """A mail server for one test alone; its answers are the test's to choose."""
    with serving(Mailbox()) as mailbox:
        yield mailbox


@pytest.fixture(scope="session")
def shared_mailbox() -> Iterator[Mailbox]:
    """The mail server of the shared stack."""
    with serving(Mailbox()) as mailbox:
        yield mailbox


@pytest.fixture
async def stack(
    engines: Engines, nats_server: Nats, databases: Databases, mailbox: Mailbox, tmp_path: Path
) -> AsyncIterator[Stack]:
    """All processes, ready, for one test alone, with databases and a NATS of their own. NATS may be killed."""
    stack = Stack(tmp_path / "stack", databases, engines.postgres, nats_server, mailbox)
    try:
        await stack.start_all()
        yield stack
    finally:
        await stack.stop_all()


@pytest.fixture
async def private_stack(private_engines: Engines, mailbox: Mailbox, tmp_path: Path) -> AsyncIterator[Stack]:
    """All processes, ready, for one test alone, that may stop and kill PostgreSQL as well."""
    stack = Stack(tmp_path / "stack", private_engines.databases(), private_engines.postgres, private_engines.nats, mailbox)
    try:
        await stack.start_all()
        yield stack
    finally:
        await stack.stop_all()


@pytest.fixture(scope="session")
def shared_stack(engines: Engines, shared_mailbox: Mailbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """All processes, ready, for all tests of this worker that stop and break nothing. Take a tenant of your own."""
    folder = tmp_path_factory.mktemp("shared_stack")
    stack = Stack(folder, engines.databases(), engines.postgres, engines.nats, shared_mailbox)
    try:
        asyncio.run(stack.start_all())
        yield stack
    finally:
        asyncio.run(stack.stop_all())

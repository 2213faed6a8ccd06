"""`foldline dev`: the whole system on this machine, until Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psycopg
from rich.console import Console
from rich.table import Table

from deploy.bootstrap import Databases, bootstrap, drop
from deploy.engines.child import NotStarted, free_port, is_free
from deploy.engines.mail import MailSink
from deploy.engines.nats import Nats
from deploy.engines.postgres import Postgres
from deploy.local.supervisor import Supervisor
from deploy.local.system import READ, SAGA, WRITE, System
from shared.platform.identity import Role
from shared.platform.migrate import SchemaTooNew
from shared.platform.postgres import UnsafeDatabase
from shared.platform.urls import refuse_admin_url, refuse_nats_url

PREFIX = "foldline"
WATCH_S = 0.2


@dataclass(slots=True)
class State:
    """Ports and passwords, which must be the same after a restart. Kept in state.json, mode 0600."""

    ports: dict[str, int] = field(default_factory=dict)
    passwords: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, file: Path) -> State:
        """The state of a folder, or a new one. Raises NotStarted if it cannot be read."""
        try:
            return cls(**json.loads(file.read_text())) if file.exists() else cls()
        except (OSError, ValueError, TypeError) as error:
            raise NotStarted(f"{file} cannot be read: {error}") from None

    def save(self, file: Path) -> None:
        """Writes it, readable for its owner alone."""
        write_private(file, asdict(self))

    def port(self, name: str) -> int:
        """The port of a name: the same at every start, unless somebody else listens there by now."""
        if not is_free(self.ports.get(name, 0)):
            self.ports[name] = free_port()
        return self.ports[name]


def write_private(file: Path, content: object) -> None:
    """Writes JSON atomically into a file of mode 0600."""
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    fresh.touch(mode=0o600)
    fresh.write_text(json.dumps(content, indent=2) + "\n")
    fresh.replace(file)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Locks the folder until this process ends. Raises NotStarted if another process holds the lock, or it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise NotStarted(f"the data folder {folder} cannot be written: {error.strerror}") from None
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise NotStarted(f"another foldline runs on {folder}; choose another folder with --data") from None
        yield


class Machine:
    """Engines, databases and processes in one folder. `DATABASE_URL` and `NATS_URL` stand for engines of one's own."""

    def __init__(self, folder: Path, *, prefix: str = PREFIX, say: Callable[[str], None] = lambda _: None) -> None:
        self.folder = folder
        self._prefix = prefix
        self._say = say
        self._state = State.load(folder / "state.json")
        self._held: psycopg.Connection | None = None
        self.postgres: Postgres | None = None
        self.nats: Nats | None = None
        self.mail = MailSink(folder / "mail", port=self._state.port("mail"))
        self.system: System | None = None
        self.admin_url = os.environ.get("DATABASE_URL", "")
        self.nats_url = os.environ.get("NATS_URL", "")

    async def start(self) -> System:
        """Starts all of it, or raises NotStarted; `stop` is to be called in both cases.

        What is malformed in the environment is refused before anything is started.
        """
        _refuse("DATABASE_URL", self.admin_url, refuse_admin_url)
        _refuse("NATS_URL", self.nats_url, refuse_nats_url)
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._start_engines()
        with self._step("databases, roles and tables are there"):
            self._held = self._hold()
            try:
                databases = bootstrap(self.admin_url, self._prefix, passwords=self._state.passwords)
            except (UnsafeDatabase, SchemaTooNew, psycopg.errors.InsufficientPrivilege) as error:
                raise NotStarted(str(error)) from None
        ports = {name: self._state.port(name) for name in (WRITE, READ, SAGA)}
        self._remember(databases)
        self.system = System(self.folder, databases, self.nats_url, ports=ports, smtp_url=self.mail.url)
        began = time.monotonic()
        await self.system.start_all(ready=lambda name: self._say(f"{name} is up ({time.monotonic() - began:.1f} s)"))
        return self.system

    async def stop(self) -> None:
        """Stops what runs: the processes in order, then the engines; 10 s at the most."""
        if self.system is not None:
            await self.system.stop_all(9.0)
        if self._held is not None:
            self._held.close()
        for engine in (self.mail, self.nats, self.postgres):
            if engine is not None:
                engine.stop(timeout_s=0.5)

    def destroy(self) -> None:
        """Deletes the data, after `stop`. Databases on a server of the user's own are dropped."""
        if self.postgres is not None:
            self.postgres.destroy()
        elif self._held is not None:
            drop(self.admin_url, self._prefix)
        shutil.rmtree(self.folder, ignore_errors=True)

    async def keep_running(self) -> None:
        """Starts programs and engines again when they die, until cancelled."""
        assert self.system is not None  # started
        async with asyncio.TaskGroup() as group:
            group.create_task(
                self.system.keep_running(lambda name, code: self._say(f"{name} ended with {code}: starting it again"))
            )
            while True:
                await asyncio.sleep(WATCH_S)
                for name, engine in (("PostgreSQL", self.postgres), ("NATS", self.nats), ("the mail server", self.mail)):
                    if engine is not None and not engine.running:
                        self._say(f"{name} ended: starting it again")
                        engine.start()

    def _start_engines(self) -> None:
        if self.admin_url:
            self._say("PostgreSQL is the server of DATABASE_URL")
        else:
            self.postgres = Postgres(self.folder / "postgres", port=self._state.port("postgres"))
            with self._step("PostgreSQL is up"):
                self.admin_url = self.postgres.start()
        if self.nats_url:
            self._say("NATS is the server of NATS_URL")
        else:
            self.nats = Nats(self.folder / "nats", port=self._state.port("nats"))
            with self._step("NATS is up"):
                self.nats_url = self.nats.start()
        with self._step("the mail server is up"):
            self.mail.start()

    def _hold(self) -> psycopg.Connection:
        """Refuses to run twice on the same databases, where each system would change the other's passwords."""
        connection = psycopg.connect(self.admin_url, autocommit=True)
        row = connection.execute("SELECT pg_try_advisory_lock(hashtextextended(%s, 1))", [self._prefix]).fetchone()
        if row != (True,):
            connection.close()
            raise NotStarted(f"another foldline uses the databases {self._prefix}_* of that server")
        return connection

    def _remember(self, databases: Databases) -> None:
        self._state.passwords = dict(databases.passwords)
        self._state.save(self.folder / "state.json")

    @contextlib.contextmanager
    def _step(self, done: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._say(f"{done} ({time.monotonic() - began:.1f} s)")


def _refuse(variable: str, url: str, refuse: Callable[[str], None]) -> None:
    """Raises NotStarted, with the variable's name, if `refuse` raises ValueError for what it says."""
    if url:
        try:
            refuse(url)
        except ValueError as error:
            raise NotStarted(f"{variable}: {error}") from None


def endpoints(machine: Machine, system: System) -> dict[str, object]:
    """The addresses and tokens for clients. It holds secrets."""
    everything = [Role.USER, Role.TENANT_ADMIN]
    return {
        "write": system.programs[WRITE].address,
        "read": system.programs[READ].address,
        "saga": system.programs[SAGA].address,
        "tokens": {
            "acme": system.token("acme", "alice", everything),
            "umbrella": system.token("umbrella", "ada", everything),
            "operator": system.token("operators", "olga", [Role.OPERATOR, Role.READER]),
        },
        "mail": str(machine.mail.folder),
        "admin_database_url": machine.admin_url,
        "saga_database_url": system.databases.saga.app,
        "saga_token_file": str(Path(system.programs[SAGA].settings["FOLDLINE_TOKEN_FILE"]).resolve()),
        "nats_url": machine.nats_url,
    }


def show(console: Console, system: Supervisor, file: Path, data: Path) -> None:
    """Prints the addresses, and what to type next."""
    table = Table(title="Foldline is up", title_justify="left", show_header=True)
    table.add_column("process")
    table.add_column("address")
    table.add_column("pid", justify="right")
    table.add_column("log", overflow="fold")
    for name, program in system.programs.items():
        address = program.address if program.port else "-"
        try:
            pid = str(system.pid(name))
        except LookupError:
            pid = "ended"  # between its start and this line; whoever watches says so and starts it again
        table.add_row(name, address, pid, os.path.relpath(system.log(name)))
    console.print(table)
    where = "" if data == Path(".foldline") else f" --data {data}"
    console.print(f"Addresses and tokens are in {file}. In another terminal:", highlight=False)
    for line in ("status", 'send RegisterPerson person_id=new name="Alice"', "get person ID", "get --help"):
        console.print(f"  foldline {line}{where if 'help' not in line else ''}", style="bold", markup=False, highlight=False)
    console.print("Ctrl-C stops everything.")


def run(data: Path = Path(".foldline"), *, ephemeral: bool = False, console: Console | None = None) -> int:
    """Runs the system until SIGINT or SIGTERM; returns the exit code. 1 if it could not start; the reason is printed.

    State is kept in `data`. With `ephemeral` the system starts from nothing and leaves nothing, and what was kept
    before is not touched. `data/endpoints.json` is there as long as the system runs.
    """
    console = console or Console()
    try:
        with alone(data):
            return asyncio.run(_run(data, ephemeral=ephemeral, console=console))
    except (NotStarted, psycopg.OperationalError) as error:
        console.print(f"foldline did not start: {error}", style="red", markup=False, highlight=False)
        return 1


async def _run(data: Path, *, ephemeral: bool, console: Console) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)

    folder, prefix, file = data, PREFIX, data / "endpoints.json"
    if ephemeral:
        folder, prefix = data / "ephemeral", f"{PREFIX}_{secrets.token_hex(4)}"
        shutil.rmtree(folder, ignore_errors=True)  # of one that was killed

    def say(text: str) -> None:
        console.print(f"  {text}", markup=False, highlight=False)

    machine = Machine(folder.absolute(), prefix=prefix, say=say)
    console.print("Starting Foldline ...")
    watch: asyncio.Task[None] | None = None
    waiting = asyncio.create_task(stop.wait())
    try:
        starting = asyncio.create_task(machine.start())
        await asyncio.wait({starting, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.wait({starting})
            return 130
        system = _unwrap(starting)
        write_private(file, endpoints(machine, system))
        show(console, system, file, data)
        watch = asyncio.create_task(machine.keep_running())
        await asyncio.wait({watch, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if watch.done():
            watch.result()
    finally:
        console.print("Stopping ...")
        waiting.cancel()
        if watch is not None:
            watch.cancel()
            await asyncio.wait({watch})
        await machine.stop()
        if ephemeral:
            machine.destroy()
        file.unlink(missing_ok=True)
    console.print("Stopped.")
    return 0


def _unwrap(starting: asyncio.Task[System]) -> System:
    """The task's result; of a group of failures, the first NotStarted."""
    try:
        return starting.result()
    except ExceptionGroup as group:
        found = group.subgroup(NotStarted)
        if found is None:
            raise
        raise found.exceptions[0] from None

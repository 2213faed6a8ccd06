"""A saga service to which something happens at a chosen place: a real process, forked from one that has all imports.

Its folds, transactions, calls and connections are the service's own. A place is a moment between two of them; what is patched in
only watches for it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn, assert_never

import psycopg

from saga_service import app
from saga_service.app import Leading, SagaSettings
from shared.folds.errors import Rejected
from shared.line.follower import Follower
from shared.platform.settings import load
from shared.processes import one_statement, runner, store
from shared.processes.dispatcher import Dispatcher
from shared.processes.records import CommandResult
from shared.processes.runner import ProcessRunner
from shared.rpc.status import to_status
from tests.support.system import forked

REFUSED = "REFUSED_BY_TEST"

AT_STEP = ("decided", "saving", "saved", "sending", "answered", "noted", "over")
"""Places at a step: its command is decided and not committed; the statement that commits it is under way, its end not heard;
committed and not sent; on its way; carried out and its answer not noted; the answer is folded and not committed; committed."""
AT_RECOVERY = ("leading", "reclaiming", "reclaimed", "claiming", "claimed")
"""Places of a new leader: it has the lease; it makes commands due again, not committed, committed; it claims them, the same."""


class Event(StrEnum):
    """What happens at the place."""

    KILL = "kill"
    """kill -9."""
    SEVER = "sever"
    """The database ends all connections of the service, as when it restarts; the service lives on."""
    STOP = "stop"
    """The service is told to stop, as in a rolling restart, and ends by itself."""


@dataclass(slots=True)
class Fate:
    """What happens, and where: at a place, there at a step if one is named, the `count`th time."""

    place: str = ""
    step: str = ""
    count: int = 1
    # Commands of these steps are not sent: they count as refused, in every life.
    refused: tuple[str, ...] = ()
    event: Event = Event.KILL
    # An administrator's URL of the saga database, to sever connections.
    admin_url: str = ""

    def at(self, place: str, steps: Iterable[str] = ()) -> None:
        """Lets it happen if this is the place."""
        if place == self.place and (not self.step or self.step in steps):
            self.count -= 1
            if self.count == 0:
                self._happen()

    def _happen(self) -> None:
        match self.event:
            case Event.KILL:
                os.kill(os.getpid(), signal.SIGKILL)
            case Event.SEVER:
                with psycopg.connect(self.admin_url, autocommit=True) as admin:
                    admin.execute(SEVER)
            case Event.STOP:
                STOPPING.set()
            case _:
                assert_never(self.event)


SEVER = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND application_name LIKE 'foldline-saga%'
"""
# Of the process that is told to stop.
STOPPING = asyncio.Event()


def start(environment: Mapping[str, str], fate: Fate) -> BaseProcess:
    """Starts a saga service with these settings. It serves nobody; it only leads."""
    process = forked.context().Process(target=_live, args=(dict(environment), fate), daemon=True)
    process.start()
    return process


@contextmanager
def living(environment: Mapping[str, str], fate: Fate) -> Any:
    """A saga service that lives until the block ends, if it is not its fate to end before."""
    process = start(environment, fate)
    try:
        yield process
    finally:
        process.kill()
        process.join()


def _live(environment: dict[str, str], fate: Fate) -> NoReturn:
    os.environ.update(environment)
    sys.argv[1:] = []
    _watch(fate)
    asyncio.run(Leading(load(SagaSettings, "saga_service")).run(STOPPING))
    os._exit(0)


def _watch(fate: Fate) -> None:
    """Puts a watcher at each place."""
    save, write, reclaim, claim = one_statement.save, store.write, store.reclaim, store.claim
    consume, take_over, hand_out, tell = (
        ProcessRunner._consume,
        ProcessRunner._take_over,
        ProcessRunner._hand_out,
        runner._tell,
    )
    send, attempt, judge = Dispatcher.send, Dispatcher._try, Dispatcher._judge

    async def watched_save(*args: Any) -> None:
        done = args[6]
        steps = [command.step for command in done.commands.values()]
        fate.at("decided", steps)
        fate.at("noted", [entry.step for entry in done.history if entry.kind == "answer"])
        saving = asyncio.create_task(save(*args))
        await asyncio.sleep(0)
        fate.at("saving", steps)
        await saving

    async def watched_write(connection: Any, done: Any, **more: Any) -> None:
        await write(connection, done, **more)
        fate.at("decided", [command.step for command in done.commands.values()])
        fate.at("noted", [entry.step for entry in done.history if entry.kind == "answer"])

    def watched_tell(done: Any, parked: Any) -> None:
        fate.at("over", [entry.step for entry in done.history if entry.kind == "answer"])
        tell(done, parked)

    async def watched_reclaim(connection: Any, now: Any) -> None:
        await reclaim(connection, now)
        fate.at("reclaiming")

    async def watched_claim(*args: Any) -> Any:
        claimed = await claim(*args)
        fate.at("claiming", [command.step for command in claimed])
        return claimed

    async def watched_consume(self: Any, connection: Any) -> None:
        fate.at("leading")
        await consume(self, connection)

    async def watched_take_over(self: Any, connection: Any) -> None:
        await take_over(self, connection)
        fate.at("reclaimed")

    async def watched_hand_out(self: Any, *args: Any) -> Any:
        claimed = await hand_out(self, *args)
        fate.at("claimed", [command.step for command in claimed])
        return claimed

    def watched_send(self: Any, commands: Any) -> None:
        commands = list(commands)
        fate.at("saved", [command.step for command in commands])
        told = [it for it in commands if it.step in fate.refused]
        error = to_status(Rejected(REFUSED, "a test refuses it"))
        self._tell(CommandResult(command, error, REFUSED) for command in told)
        send(self, [it for it in commands if it.step not in fate.refused])

    async def watched_try(self: Any, batch: Any) -> None:
        trying = asyncio.create_task(attempt(self, batch))
        await asyncio.sleep(0.001)
        fate.at("sending", [command.step for command in batch])
        await trying

    def watched_judge(self: Any, command: Any, receipt: Any) -> Any:
        fate.at("answered", [command.step])
        return judge(self, command, receipt)

    for owner, name, watched in (
        (one_statement, "save", watched_save),
        (store, "write", watched_write),
        (store, "reclaim", watched_reclaim),
        (store, "claim", watched_claim),
        (runner, "_tell", watched_tell),
        (ProcessRunner, "_consume", watched_consume),
        (ProcessRunner, "_take_over", watched_take_over),
        (ProcessRunner, "_hand_out", watched_hand_out),
        (Dispatcher, "send", watched_send),
        (Dispatcher, "_try", watched_try),
        (Dispatcher, "_judge", watched_judge),
        # From the event store alone: the stream is only a copy, and slower for one event.
        (app, "Follower", lambda line, feed, **more: Follower(line, None, silence_s=0.02, **more)),
    ):
        setattr(owner, name, watched)

"""A saga service that halts at a chosen place: a real process, forked from one that has all imports.

Its folds, transactions, calls and connections are the service's own. A place is a moment between two of them; what is patched in
only watches for it, and then stops the process as SIGSTOP does. The test decides what happens meanwhile and how it goes on.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

from saga_service import app
from saga_service.app import Leading, SagaSettings
from saga_service.registry import PROCESSES
from shared.folds.errors import Rejected
from shared.folds.process import ProcessDefinition
from shared.line.follower import Follower
from shared.platform import leader
from shared.platform.telemetry import Unconfigured, divert
from shared.processes import one_statement, runner, store
from shared.processes.deliveries import DeliverySender
from shared.processes.dispatcher import Dispatcher
from shared.processes.records import CommandResult
from shared.processes.retention import ProcessRetention
from shared.processes.runner import ProcessRunner
from shared.rpc.status import to_status
from tests.support.system import forked
from tests.support.system.alignment import Alignment
from tests.support.system.waiting import eventually

REFUSED = "REFUSED_BY_TEST"
WRITES_REFUSED = 7
"""The exit code of one that does not see that it leads no more, when the first thing that it goes on with is refused."""

ALIGNED = "aligned"
"""The place where the commands before all processes' steps are committed and none of them is sent."""
AT_STEP = ("decided", "saving", "saved", "sending", "answered", "noted", "over")
"""Places at a step: its command is decided and not committed; the statement that commits it is under way, its end not heard;
committed and not sent; on its way; carried out and its answer not noted; the answer is folded and not committed; committed."""
AT_RECOVERY = ("leading", "reclaiming", "reclaimed", "claiming", "claimed")
"""Places of a new leader: it has the lease; it makes commands due again, not committed, committed; it claims them, the same."""

Steps = Iterable[tuple[str, str]]
"""Process ids with a step of each."""


@dataclass(slots=True, kw_only=True)
class Halt:
    """Where a service halts, and for which processes."""

    place: str = ""
    """Nowhere if empty."""
    count: int = 1
    """At which of the times when it comes there."""
    steps: Mapping[str, str] = field(default_factory=dict)
    """The step of each process: the place is where one of them is there. Any if empty."""
    before: Mapping[str, str] = field(default_factory=dict)
    """See `Alignment`; not aligned if empty."""
    refused: frozenset[tuple[str, str]] = frozenset()
    """Process ids with a step: its command is not sent, and counts as refused."""
    only: frozenset[str] | None = None
    """The processes that this service runs; None: all."""
    blind: bool = False
    """Whether it does not see that it leads no more, and ends when what it goes on with is refused."""
    asked_again_s: float = 3600.0
    """When a command without an answer is sent again, in place of a minute: what recovery leaves out must not come by itself."""
    lease_s: float = leader.SESSION_TIMEOUT_S
    """For so long it keeps its lease after it has halted."""
    report: Path | None = None
    """A file to which the ids of the processes are added that are at the place."""

    @property
    def happened(self) -> bool:
        """Whether it has halted."""
        return bool(self.place) and self.count <= 0

    def at(self, place: str, steps: Steps = ()) -> None:
        """Halts if this is the place."""
        if place != self.place:
            return
        here = [id_ for id_, step in steps if self.steps.get(id_) == step]
        if self.steps and place in AT_STEP and not here:
            return
        self.count -= 1
        if self.count == 0:
            if self.report is not None:
                with self.report.open("a") as file:
                    file.writelines(f"{id_}\n" for id_ in here)
            os.kill(os.getpid(), signal.SIGSTOP)


class Life:
    """A saga service that serves nobody; it only leads. Leaving the block kills it."""

    def __init__(self, settings: Mapping[str, Any], halt: Halt) -> None:
        """`settings` are the fields of SagaSettings as they are read: reading them anew is half of a start."""
        self._process: BaseProcess = forked.context().Process(target=_live, args=(dict(settings), halt), daemon=True)

    def __enter__(self) -> Life:
        self._process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def is_halted(self) -> bool:
        """Whether it has halted."""
        try:
            state = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return False
        return state == "T"

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.is_alive()

    async def halts(self, deadline_s: float = 120) -> None:
        """Waits until it has halted."""

        def halted() -> bool:
            assert self.is_alive, f"it ended with {self._process.exitcode}"
            return self.is_halted

        await eventually(halted, deadline_s)

    async def halts_within(self, time_s: float) -> bool:
        """Gives it some time; whether it has halted then."""
        with suppress(AssertionError):
            await self.halts(time_s)
        return self.is_halted

    def kill(self) -> None:
        """Kills it with -9."""
        self._process.kill()
        self._process.join()

    def go_on(self) -> None:
        """Lets it go on from where it halted."""
        self._signal(signal.SIGCONT)

    def terminate(self) -> None:
        """Tells it to stop, as a rolling restart does, and lets it go on."""
        self._signal(signal.SIGTERM)
        self.go_on()

    async def ends(self) -> int:
        """Waits for its end; returns the exit code."""
        return await forked.ended(self._process)

    def _signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)


class _Errors(Unconfigured):
    """Prints what a reader of a failed test may want, and no more."""

    level = logging.ERROR


def _live(settings: dict[str, Any], halt: Halt) -> NoReturn:
    divert(_Errors())
    asyncio.run(_lead(SagaSettings.model_construct(**settings), halt))
    os._exit(0)


async def _lead(settings: SagaSettings, halt: Halt) -> None:
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    _watch(halt, Alignment(halt.before) if halt.before else None)
    definitions = PROCESSES if halt.only is None else [_only(definition, halt.only) for definition in PROCESSES]
    await Leading(settings, definitions).run(stopping)


def _only(definition: ProcessDefinition[Any], ids: frozenset[str]) -> ProcessDefinition[Any]:
    """The definition, which leaves others' processes alone."""

    def react(state: Any, event: Any, envelope: Any) -> Any:
        return definition.react(state, event, envelope) if envelope.aggregate_id in ids else None

    return replace(definition, react=react)


def _commands(commands: Iterable[Any]) -> list[tuple[str, str]]:
    return [(command.process_id, command.step) for command in commands]


def _answers(done: Any) -> list[tuple[str, str]]:
    return [(entry.process_id, entry.step) for entry in done.history if entry.kind == "answer"]


def _watch(halt: Halt, alignment: Alignment | None) -> None:
    """Puts a watcher at each place."""
    save, write, reclaim, claim, tell = one_statement.save, store.write, store.reclaim, store.claim, runner._tell
    consume, take_over, hand_out = ProcessRunner._consume, ProcessRunner._take_over, ProcessRunner._hand_out
    send, take, attempt, judge = Dispatcher.send, Dispatcher.take, Dispatcher._try, Dispatcher._judge
    # What is under way in each dispatcher's last call.
    under_way: list[tuple[str, str]] = []

    async def watched_save(*args: Any) -> None:
        done = args[6]
        halt.at("decided", _commands(done.commands.values()))
        halt.at("noted", _answers(done))
        saving = asyncio.create_task(save(*args))
        await asyncio.sleep(0)
        halt.at("saving", _commands(done.commands.values()))
        await saving

    async def watched_write(connection: Any, done: Any, **more: Any) -> None:
        await write(connection, done, **more)
        halt.at("decided", _commands(done.commands.values()))
        halt.at("noted", _answers(done))
        # The commit follows, with nothing to wait for in between.
        asyncio.get_running_loop().call_soon(halt.at, "saving", _commands(done.commands.values()))

    def watched_tell(done: Any, parked: Any) -> None:
        halt.at("over", _answers(done))
        tell(done, parked)

    async def watched_reclaim(connection: Any, now: Any) -> None:
        await reclaim(connection, now)
        halt.at("reclaiming")

    async def watched_claim(*args: Any) -> Any:
        claimed = await claim(*args)
        halt.at("claiming")
        return claimed

    async def watched_consume(self: Any, connection: Any) -> None:
        halt.at("leading")
        try:
            await consume(self, connection)
        except Exception:
            if halt.blind and halt.happened:
                os._exit(WRITES_REFUSED)
            raise

    async def watched_take_over(self: Any, connection: Any) -> None:
        await take_over(self, connection)
        halt.at("reclaimed")

    async def watched_hand_out(self: Any, *args: Any) -> Any:
        claimed = await hand_out(self, *args)
        halt.at("claimed")
        return claimed

    def watched_send(self: Any, commands: Any) -> None:
        halt.at("saved", _commands(commands))
        if alignment is not None:
            commands = alignment.send(commands)
            if alignment.reached:
                halt.at(ALIGNED)
        told = [it for it in commands if (it.process_id, it.step) in halt.refused]
        error = to_status(Rejected(REFUSED, "a test refuses it"))
        self._tell(CommandResult(command, error, REFUSED) for command in told)
        send(self, [it for it in commands if it not in told])

    def watched_take(self: Any) -> Any:
        return take(self) if alignment is None else alignment.take(take(self))

    async def watched_try(self: Any, batch: Any) -> None:
        under_way[:] = _commands(batch)
        trying = asyncio.create_task(attempt(self, batch))
        await asyncio.sleep(0.001)
        halt.at("sending", _commands(batch))
        await trying

    def watched_judge(self: Any, command: Any, receipt: Any) -> Any:
        halt.at("answered", under_way)
        return judge(self, command, receipt)

    class WatchedFollower(Follower):
        """From the event store alone: the stream is only a copy, and slower for one event."""

        def __init__(self, line: Any, _: Any, **more: Any) -> None:
            super().__init__(line, None, silence_s=0.02, **more)

        def follow(self, checkpoint: Any) -> AsyncGenerator[Any, None]:
            batches = super().follow(checkpoint)
            return batches if alignment is None else alignment.follow(checkpoint, batches)

    async def for_ever(*_: Any) -> None:
        await asyncio.Event().wait()

    watchers: list[tuple[Any, str, Any]] = [
        (one_statement, "save", watched_save),
        (store, "write", watched_write),
        (store, "reclaim", watched_reclaim),
        (store, "claim", watched_claim),
        (runner, "_tell", watched_tell),
        (ProcessRunner, "_consume", watched_consume),
        (ProcessRunner, "_take_over", watched_take_over),
        (ProcessRunner, "_hand_out", watched_hand_out),
        (Dispatcher, "send", watched_send),
        (Dispatcher, "take", watched_take),
        (Dispatcher, "_try", watched_try),
        (Dispatcher, "_judge", watched_judge),
        (app, "Follower", WatchedFollower),
        # They have connections of their own, and nothing to do here.
        (DeliverySender, "run", for_ever),
        (ProcessRetention, "run", for_ever),
    ]
    runner.ASKED_AGAIN_S = halt.asked_again_s
    leader.SESSION_TIMEOUT_S = halt.lease_s
    if halt.blind:
        watchers.append((leader, "_beat", for_ever))
    for owner, name, watched in watchers:
        setattr(owner, name, watched)

"""Who waits for what: the commands that are under way, each once, and how many there may be."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from google.rpc import status_pb2
from msgspec import Struct

from shared.commands.decide import Command, Outcome
from shared.commands.log import CommandKey, StoredCommand
from shared.folds.errors import BatchAborted, Code, Invalid, OverLimit, Refusal, Unavailable
from shared.rpc.status import from_status


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a committer takes on. Sizes are of the commands' payloads."""

    batch_commands_max: int = 256
    batch_bytes_max: int = 4 * 1024 * 1024
    queue_commands_max: int = 8192
    queue_bytes_max: int = 64 * 1024 * 1024
    tenant_commands_max: int = 4096
    cached_aggregates_max: int = 20_000
    gather_wait_s_max: float = 0.05
    # So many commands must wait undecided, for any of them to be decided before it is their turn.
    decide_ahead_min: int = 16
    commit_timeout_s: float = 10.0


class PendingReply(Struct, eq=False):
    """One caller, to be awaited for the outcomes of its units.

    A caller that goes away cancels its own future and nothing else.
    """

    future: asyncio.Future[None]
    asked: Sequence[list[Command]]
    # The units that it waits for: its own, or those of others with the same commands.
    taken: list[CommandGroup] = []
    # One for the call itself, until all its units are taken.
    remaining: int = 1

    def __await__(self) -> Generator[Any, None, list[list[Outcome]]]:
        yield from self.future
        return [[unit.outcomes[command.key] for command in asked] for unit, asked in zip(self.taken, self.asked, strict=True)]

    def one_done(self) -> None:
        """One unit fewer to wait for."""
        self.remaining -= 1
        if not self.remaining and not self.future.done():
            self.future.set_result(None)


class CommandGroup(Struct, eq=False):
    """Commands that stand or fall together, and who waits for them."""

    commands: list[Command]
    size: int
    outcomes: dict[CommandKey, Outcome] = {}
    waiters: list[PendingReply] = []
    settled: bool = False

    def open(self) -> list[Command]:
        """The commands that have no outcome yet."""
        if not self.outcomes:
            return self.commands
        return [command for command in self.commands if command.key not in self.outcomes]


class Intake:
    """The books of what is under way. A command that comes again meanwhile waits for the outcome of the first."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._under_way: dict[CommandKey, CommandGroup] = {}
        self._bytes = 0
        self._by_tenant: dict[str, int] = {}

    @property
    def empty(self) -> bool:
        """Whether nothing is under way."""
        return not (self._under_way or self._bytes or self._by_tenant)

    def refuse_if_full(self, units: Sequence[list[Command]]) -> None:
        """Raises OverLimit (QUEUE_FULL, TENANT_OVER_QUOTA) if these are more than may be under way."""
        limits = self._limits
        count = len(self._under_way) + sum([len(unit) for unit in units])
        size = self._bytes + sum([len(command.payload) for unit in units for command in unit])
        if count > limits.queue_commands_max or size > limits.queue_bytes_max:
            raise OverLimit("QUEUE_FULL", "too many commands are waiting", retry_after_s=0.5)
        if count <= limits.tenant_commands_max:
            return  # all tenants together are not over the quota of one
        tenants = Counter([command.key[0] for unit in units for command in unit])
        for tenant, more in tenants.items():
            if self._by_tenant.get(tenant, 0) + more > limits.tenant_commands_max:
                raise OverLimit("TENANT_OVER_QUOTA", "too many commands of this tenant are waiting", retry_after_s=0.5)

    def admit(self, commands: list[Command]) -> tuple[CommandGroup, bool]:
        """The unit of these commands, and whether it is still to be carried out.

        If not, it is refused already, or it is that of the same command, which is under way.
        """
        unit = CommandGroup(commands, sum([len(command.payload) for command in commands]))
        if len(commands) > 1:
            unit.commands = list({command.key: command for command in commands}.values())
            if len({(command.key, command.fingerprint) for command in commands}) > len(unit.commands):
                return self._refused(unit, id_reused())
        for command in unit.commands:
            if (same := self._under_way.get(command.key)) is None:
                continue
            if len(unit.commands) > 1 or len(same.commands) > 1:
                return self._refused(unit, Unavailable("COMMAND_IN_FLIGHT", "a command of this id is under way"))
            if same.commands[0].fingerprint != command.fingerprint:
                return self._refused(unit, id_reused())
            return same, False
        by_tenant = self._by_tenant
        for command in unit.commands:
            self._under_way[command.key] = unit
            by_tenant[command.key[0]] = by_tenant.get(command.key[0], 0) + 1
        self._bytes += unit.size
        return unit, True

    def _refused(self, unit: CommandGroup, refusal: Refusal) -> tuple[CommandGroup, bool]:
        unit.outcomes = {command.key: Outcome("rejected", 0, 0, 0, 0, refusal) for command in unit.commands}
        unit.settled = True
        return unit, False

    def settle(self, units: list[CommandGroup], outcomes: Mapping[CommandKey, Outcome]) -> None:
        """Answers units with these outcomes; what has one already keeps it."""
        by_tenant = self._by_tenant
        for unit in units:
            if unit.settled:
                continue
            unit.settled = True
            for command in unit.commands:
                key = command.key
                if key not in unit.outcomes:
                    unit.outcomes[key] = outcomes[key]
                del self._under_way[key]
                by_tenant[key[0]] -= 1
                if not by_tenant[key[0]]:
                    del by_tenant[key[0]]
            self._bytes -= unit.size
            for waiter in unit.waiters:
                waiter.one_done()

    def refuse(self, units: list[CommandGroup], refusal: Refusal) -> None:
        """Answers all that has no outcome yet with one refusal."""
        status = "failed" if refusal.code is Code.INTERNAL else "rejected"
        for unit in units:
            self.settle([unit], {command.key: Outcome(status, 0, 0, 0, 0, refusal) for command in unit.open()})

    def settle_known(self, units: list[CommandGroup], stored: Mapping[CommandKey, StoredCommand]) -> list[CommandGroup]:
        """Answers the commands that have an outcome in the log with it; returns the units in which any is left."""
        left = []
        for unit in units:
            for command in unit.open():
                row = stored.get(command.key)
                if row is not None and is_final(row, command):
                    unit.outcomes[command.key] = outcome_again(row, command)
            if unit.open() and not any(outcome.refusal for outcome in unit.outcomes.values()):
                left.append(unit)
            else:
                self.refuse([unit], BatchAborted())
        return left


def is_final(row: StoredCommand, command: Command) -> bool:
    """Whether the row is the answer: a command that met a defect may come again, but not as another."""
    return row.status != "failed" or row.fingerprint != command.fingerprint


def outcome_again(row: StoredCommand, command: Command) -> Outcome:
    """The first answer, or a refusal if the same id came with another content."""
    if row.fingerprint != command.fingerprint:
        return Outcome("rejected", 0, 0, 0, row.head, id_reused())
    refusal = from_status(status_pb2.Status.FromString(row.error)) if row.error else None
    return Outcome(row.status, row.version, row.events_appended, row.position, row.head, refusal)


def id_reused() -> Refusal:
    """A command id came with another content than the first time."""
    return Invalid("COMMAND_ID_REUSED", "this command id was used for another content")

"""The commands in progress, each once, the callers that wait for them, and the limits on both."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    """The limits of one committer. Sizes count the commands' payloads."""

    batch_commands_max: int = 256
    batch_bytes_max: int = 4 * 1024 * 1024
    # No further command is decided in a batch that has so many events: reactions make up to a thousand of one command.
    batch_events_max: int = 4096
    # One tenant alone may have all of the queue waiting. A tenant within its share, an equal part for each tenant that has
    # commands waiting, is admitted up to twice that, so that no other tenant can fill the queue before it.
    queue_commands_max: int = 8192
    queue_bytes_max: int = 64 * 1024 * 1024
    cached_aggregates_max: int = 20_000
    gather_wait_s_max: float = 0.05
    # Deciding ahead starts when this many commands wait undecided.
    decide_ahead_min: int = 16
    commit_timeout_s: float = 10.0


class PendingReply(Struct, eq=False):
    """Awaitable for one caller: a list of outcomes for each of its groups.

    A caller that goes away cancels its own future; its commands are carried out all the same.
    """

    future: asyncio.Future[None]
    asked: Sequence[list[Command]]
    # The groups that it waits for: its own, or an earlier caller's group with the same command.
    taken: list[CommandGroup] = []
    # Groups without outcomes; starts at one for the call itself, until all its groups are admitted.
    remaining: int = 1

    def __await__(self) -> Generator[Any, None, list[list[Outcome]]]:
        yield from self.future
        return [[group.outcomes[command.key] for command in asked] for group, asked in zip(self.taken, self.asked, strict=True)]

    def one_done(self) -> None:
        """One group fewer to wait for."""
        self.remaining -= 1
        if not self.remaining and not self.future.done():
            self.future.set_result(None)


class CommandGroup(Struct, eq=False):
    """Commands that are carried out all or not at all, and the replies that wait for them."""

    commands: list[Command]
    size: int
    outcomes: dict[CommandKey, Outcome] = {}
    replies: list[PendingReply] = []
    settled: bool = False

    @property
    def tenant(self) -> str:
        """The tenant in whose turn the group is carried out: the first command's, of a process's group for several."""
        return self.commands[0].key[0]

    def open(self) -> list[Command]:
        """The commands that have no outcome yet."""
        if not self.outcomes:
            return self.commands
        return [command for command in self.commands if command.key not in self.outcomes]


class Intake:
    """The commands in progress. A command that arrives again meanwhile waits for the outcome of the first."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._under_way: dict[CommandKey, CommandGroup] = {}
        self._bytes = 0
        self._by_tenant: dict[str, int] = {}
        self._bytes_by_tenant: dict[str, int] = {}
        self._announced = 0

    @property
    def empty(self) -> bool:
        """Whether no command is in progress."""
        return not (self._under_way or self._bytes or self._by_tenant or self._bytes_by_tenant)

    def waiting(self, tenant: str) -> int:
        """How many commands of a tenant are in progress."""
        return self._by_tenant.get(tenant, 0)

    def refuse_if_full(self, groups: Sequence[list[Command]]) -> None:
        """Raises OverLimit (QUEUE_FULL, TENANT_OVER_QUOTA) if these would exceed a limit."""
        limits = self._limits
        count = len(self._under_way) + self._announced + sum([len(group) for group in groups])
        size = self._bytes + sum([len(command.payload) for group in groups for command in group])
        if count <= limits.queue_commands_max and size <= limits.queue_bytes_max:
            return
        self._refuse_beyond_share(Counter([command.key[0] for group in groups for command in group]), size - self._bytes)

    @contextmanager
    def announced(self, tenant: str, count: int) -> Iterator[None]:
        """Counts so many commands of a tenant as waiting until the end of the block, while work is done on them.

        Raises as `refuse_if_full` does, before that work, and so that calls that prepare a batch cannot pile up.
        """
        if len(self._under_way) + self._announced + count > self._limits.queue_commands_max:
            self._refuse_beyond_share({tenant: count}, 0)
        self._add(tenant, count)
        self._announced += count
        try:
            yield
        finally:
            self._announced -= count
            self._add(tenant, -count)

    def _add(self, tenant: str, count: int) -> None:
        """Changes how many commands of a tenant are waiting."""
        waiting = self._by_tenant.get(tenant, 0) + count
        if waiting:
            self._by_tenant[tenant] = waiting
        else:
            self._by_tenant.pop(tenant, None)

    def _refuse_beyond_share(self, asked: Mapping[str, int], asked_bytes: int) -> None:
        limits = self._limits
        tenants = self._by_tenant.keys() | asked.keys()
        within_share = self._within_share(asked, asked_bytes, shares=len(tenants))
        if len(tenants) > 1 and not within_share:
            raise OverLimit("TENANT_OVER_QUOTA", "too many commands of this tenant are waiting", retry_after_s=0.5)
        too_many = len(self._under_way) + self._announced + sum(asked.values()) > 2 * limits.queue_commands_max
        if not within_share or too_many or self._bytes + asked_bytes > 2 * limits.queue_bytes_max:
            raise OverLimit("QUEUE_FULL", "too many commands are waiting", retry_after_s=0.5)

    def _within_share(self, asked: Mapping[str, int], asked_bytes: int, *, shares: int) -> bool:
        """Whether each tenant would have at most its share of the queue waiting, if this was admitted."""
        limits = self._limits
        waiting_bytes = sum([self._bytes_by_tenant.get(tenant, 0) for tenant in asked])
        return waiting_bytes + asked_bytes <= limits.queue_bytes_max * len(asked) // shares and all(
            self._by_tenant.get(tenant, 0) + more <= limits.queue_commands_max // shares for tenant, more in asked.items()
        )

    def admit(self, commands: list[Command]) -> tuple[CommandGroup, bool]:
        """The group of these commands, and True if it is new and must be carried out.

        False: the group is refused already, or it is an earlier caller's group with the same command, in progress.
        """
        group = CommandGroup(commands, sum([len(command.payload) for command in commands]))
        if len(commands) > 1:
            group.commands = list({command.key: command for command in commands}.values())
            if len({(command.key, command.fingerprint) for command in commands}) > len(group.commands):
                return self._refused(group, id_reused())
        for command in group.commands:
            if (same := self._under_way.get(command.key)) is None:
                continue
            if len(group.commands) > 1 or len(same.commands) > 1:
                return self._refused(group, Unavailable("COMMAND_IN_FLIGHT", "a command of this id is under way"))
            if same.commands[0].fingerprint != command.fingerprint:
                return self._refused(group, id_reused())
            return same, False
        by_tenant = self._by_tenant
        for command in group.commands:
            self._under_way[command.key] = group
            by_tenant[command.key[0]] = by_tenant.get(command.key[0], 0) + 1
        self._bytes += group.size
        self._bytes_by_tenant[group.tenant] = self._bytes_by_tenant.get(group.tenant, 0) + group.size
        return group, True

    def refused(self, commands: list[Command], refusal: Refusal) -> tuple[CommandGroup, bool]:
        """A group that is refused before anything is done for it, as `admit` returns it."""
        return self._refused(CommandGroup(commands, 0), refusal)

    def _refused(self, group: CommandGroup, refusal: Refusal) -> tuple[CommandGroup, bool]:
        group.outcomes = {command.key: Outcome("rejected", 0, 0, 0, 0, refusal) for command in group.commands}
        group.settled = True
        return group, False

    def settle(self, groups: list[CommandGroup], outcomes: Mapping[CommandKey, Outcome]) -> None:
        """Answers groups with these outcomes; a command that has an outcome already keeps it."""
        by_tenant = self._by_tenant
        for group in groups:
            if group.settled:
                continue
            group.settled = True
            for command in group.commands:
                key = command.key
                if key not in group.outcomes:
                    group.outcomes[key] = outcomes[key]
                del self._under_way[key]
                by_tenant[key[0]] -= 1
                if not by_tenant[key[0]]:
                    del by_tenant[key[0]]
            self._bytes -= group.size
            if left := self._bytes_by_tenant.get(group.tenant, 0) - group.size:
                self._bytes_by_tenant[group.tenant] = left
            else:
                self._bytes_by_tenant.pop(group.tenant, None)
            for reply in group.replies:
                reply.one_done()

    def refuse(self, groups: list[CommandGroup], refusal: Refusal) -> None:
        """Answers every command that has no outcome yet with one refusal."""
        status = "failed" if refusal.code is Code.INTERNAL else "rejected"
        for group in groups:
            self.settle([group], {command.key: Outcome(status, 0, 0, 0, 0, refusal) for command in group.open()})

    def settle_known(self, groups: list[CommandGroup], stored: Mapping[CommandKey, StoredCommand]) -> list[CommandGroup]:
        """Answers commands with their outcomes from the log; returns the groups in which commands are left."""
        left = []
        for group in groups:
            for command in group.open():
                row = stored.get(command.key)
                if row is not None and is_final(row, command):
                    group.outcomes[command.key] = outcome_again(row, command)
            if group.open() and not any(outcome.refusal for outcome in group.outcomes.values()):
                left.append(group)
            else:
                self.refuse([group], BatchAborted())
        return left


def is_final(row: StoredCommand, command: Command) -> bool:
    """Whether the row answers the command.

    It does not if the command `failed` and comes again with the same content, or is `scheduled` and comes because it is due.
    """
    if row.fingerprint != command.fingerprint:
        return True
    return row.status != "failed" and not (row.status == "scheduled" and row.due_at == command.due_at)


def outcome_again(row: StoredCommand, command: Command) -> Outcome:
    """The first outcome again, or a refusal if the command id came with another content."""
    if row.fingerprint != command.fingerprint:
        return Outcome("rejected", 0, 0, 0, row.head, id_reused(row))
    refusal = from_status(status_pb2.Status.FromString(row.error)) if row.error else None
    return Outcome(row.status, row.version, row.events_appended, row.position, row.head, refusal)


def id_reused(row: StoredCommand | None = None) -> Refusal:
    """The refusal of a command id that was used with another content before: `row`, if that is in the log.

    `used_by` says whether a process sent that: a process always names a cause or a user, and nobody else may.
    """
    refusal = Invalid("COMMAND_ID_REUSED", "this command id was used for another content")
    if row is not None:
        refusal.facts["used_by"] = "process" if row.causation_id or row.on_behalf_of else "client"
    return refusal

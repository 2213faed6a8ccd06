"""The commands of one append, on their way from the queue to their outcomes."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from msgspec import Struct

from shared.commands.cache import Cache
from shared.commands.decide import BatchDecider, decide
from shared.commands.intake import CommandGroup
from shared.commands.log import CommandKey
from shared.line.event_store import AggregateKey


class CommandBatch(Struct, eq=False):
    """Groups for one append, the first `decided` of which are decided already."""

    deciding: BatchDecider
    # The cache when deciding began: when the committer replaces its cache, these decisions are void.
    cache: Cache
    groups: list[CommandGroup] = []
    tenants: set[str] = set()
    decided: int = 0
    commands: int = 0
    size: int = 0

    def add(self, group: CommandGroup) -> None:
        """Takes a group in, as the last one."""
        self.groups.append(group)
        self.tenants.add(group.tenant)
        self.commands += len(group.commands)
        self.size += group.size

    def has_room(self, group: CommandGroup, commands_max: int, bytes_max: int) -> bool:
        """Whether the group fits; into an empty batch any group does."""
        return not self.groups or (self.commands + len(group.commands) <= commands_max and self.size + group.size <= bytes_max)

    def decide(self, now: datetime, events_max: int) -> set[AggregateKey]:
        """Decides the remaining groups in order until there are many events, or one needs a state that is not loaded.

        Returns the keys of all states that the undecided groups need and that are not loaded.
        """
        while self.decided < len(self.groups) and len(self.deciding.plan.batch.events) < events_max:
            if not self.deciding.take(self.groups[self.decided].open(), now):
                rest = [group.open() for group in self.groups[self.decided :]]
                return decide(self.deciding.registry, rest, self.deciding.at, now).missing
            self.decided += 1
        return set()


def keys_of(groups: Sequence[CommandGroup]) -> list[CommandKey]:
    """The keys of all commands of the groups."""
    return [command.key for group in groups for command in group.commands]

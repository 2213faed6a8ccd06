"""A write service without its RPCs: a table of commands, a committer and its loop, on a real database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from deploy.bootstrap import Database
from shared.commands.committer import Committer
from shared.commands.decide import Command, Outcome, Sender
from shared.commands.intake import Limits
from shared.commands.registry import CommandRegistry
from shared.folds.errors import Refusal
from shared.platform.identity import Role

TENANT = "acme"
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def make_command(
    bus: CommandRegistry,
    content: Any,
    *,
    id: str | None = None,  # noqa: A002 (as the field is called)
    tenant: str = TENANT,
    expected_version: int | None = None,
    user_id: str = "alice",
    on_behalf_of: str = "",
    causation_id: str | None = None,
    correlation_id: str = "",
    traceparent: str = "",
) -> Command:
    """A valid command as the RPCs would make it, of a domain's struct."""
    codec = bus.codecs.of(content)
    route = bus.route(codec.type_name)
    assert route is not None
    message = codec.message.FromString(codec.encode(content))
    for name in codec.redacted:
        message.ClearField(name)
    payload = message.SerializeToString()
    key = (tenant, id or str(uuid4()))
    return Command(
        key=key,
        route=route,
        aggregate=(tenant, route.aggregate.category, route.id(content)),
        content=content,
        payload=payload,
        expected_version=expected_version,
        correlation_id=correlation_id or key[1],
        sender=Sender(
            tenant=tenant,
            user_id=user_id,
            on_behalf_of=on_behalf_of,
            roles=frozenset({Role.USER}),
            causation_id=causation_id,
            traceparent=traceparent,
        ),
        received_at=NOW,
    )


@dataclass(frozen=True, slots=True)
class Replica:
    """One of any number that share a database."""

    bus: CommandRegistry
    committer: Committer

    def command(self, content: Any, **more: Any) -> Command:
        """See `make_command`."""
        return make_command(self.bus, content, **more)

    async def ask(self, *commands: Command) -> list[Outcome]:
        """The outcomes of commands that came in one call, each for itself."""
        return [outcome for [outcome] in await self.committer.submit([[command] for command in commands])]

    async def ask_one(self, content: Any, **more: Any) -> Outcome:
        """The outcome of one command."""
        [outcome] = await self.ask(self.command(content, **more))
        return outcome

    async def ask_atomic(self, *commands: Command) -> list[Outcome]:
        """The outcomes of commands that stand or fall together."""
        [outcomes] = await self.committer.submit([list(commands)])
        return outcomes


@asynccontextmanager
async def replica(
    database: Database,
    bus: CommandRegistry,
    *,
    limits: Limits | None = None,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> AsyncIterator[Replica]:
    """A running replica. At the end it drains, as after SIGTERM."""
    committer = Committer(database.app, bus, shard=1, clock=clock, limits=limits)
    running = asyncio.create_task(committer.run())
    try:
        yield Replica(bus, committer)
    finally:
        committer.close()
        await asyncio.wait_for(running, 20)


def reasons(outcomes: Sequence[Outcome]) -> list[str]:
    """Of each outcome: its status if it was accepted, else why not."""
    return [outcome.refusal.reason if outcome.refusal else outcome.status for outcome in outcomes]


def refusal(outcome: Outcome) -> Refusal:
    """Why a command was not accepted."""
    assert outcome.refusal is not None, outcome
    return outcome.refusal

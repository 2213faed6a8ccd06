"""The registration table: which command is decided where, and what follows an event in the same transaction."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.message import Message
from msgspec import Struct, json

from shared.commands.codec import Codec, Pair
from shared.folds.aggregate import Aggregate, Decision, Handler
from shared.platform.identity import Role

Prepare = Callable[[Any], Awaitable[Any]]
"""Turns a command's content into what is decided on, outside of the decision: hashes a password, for one."""


@dataclass(frozen=True, slots=True)
class Route:
    """Where a command goes."""

    pair: Pair
    handler: Handler
    roles: frozenset[Role]
    prepare: Prepare | None = None
    # Of the tenants that decide on it in their own way.
    overrides: dict[str, Decision] = field(default_factory=dict)

    def decision(self, tenant: str) -> Decision:
        """The decision on the command: the tenant's own, or everybody's."""
        return self.overrides.get(tenant, self.handler.decide)


class CommandRegistry:
    """One service's table, filled by plain calls at start-up. Registering anything twice raises TypeError."""

    def __init__(self) -> None:
        self.codec = Codec()
        self._aggregates: dict[str, Aggregate[Any, Any]] = {}
        self._routes: dict[str, Route] = {}
        self._reactions: dict[type, list[Handler]] = {}

    def aggregate(self, aggregate: Aggregate[Any, Any], events: Mapping[type[Struct], type[Message]]) -> None:
        """Adds a kind of aggregate with its events, each with the message it is stored as."""
        if aggregate.category in self._aggregates:
            raise TypeError(f"{aggregate.category} is registered twice")
        self._aggregates[aggregate.category] = aggregate
        for struct, message in events.items():
            self.codec.add(struct, message)

    def register(
        self,
        message: type[Message],
        command: type[Struct],
        handler: Handler,
        roles: frozenset[Role],
        *,
        prepare: Prepare | None = None,
    ) -> None:
        """Says where the command that arrives as `message` is decided, and which roles may send it, by any RPC.

        A command that must be prepared is sent by itself, never in a batch.
        """
        self._check(handler)
        pair = self.codec.add(command, message)
        self._routes[pair.type_name] = Route(pair, handler, roles, prepare)

    def override(self, command: type[Struct], decide: Decision, *, tenant: str) -> None:
        """Replaces the decision on a command for one tenant."""
        route = next((route for route in self._routes.values() if route.pair.struct is command), None)
        if route is None:
            raise TypeError(f"{command.__name__} is not registered")
        if tenant in route.overrides:
            raise TypeError(f"{route.pair.type_name} is overridden twice for {tenant}")
        route.overrides[tenant] = decide

    def react(self, event: type, handler: Handler) -> None:
        """Lets an event change another aggregate in the same transaction; a refusal there undoes the command."""
        self._check(handler)
        reactions = self._reactions.setdefault(event, [])
        if handler in reactions:
            raise TypeError(f"a reaction to {event.__name__} is registered twice")
        reactions.append(handler)

    def _check(self, handler: Handler) -> None:
        if self._aggregates.get(handler.aggregate.category) is not handler.aggregate:
            raise TypeError(f"{handler.aggregate.category} is not registered")

    def route(self, type_name: str) -> Route | None:
        """Where the command of this message type goes; None if nobody takes it."""
        return self._routes.get(type_name)

    def commands(self) -> list[str]:
        """The full message names of all commands, sorted."""
        return sorted(self._routes)

    def reactions(self, event: type) -> list[Handler]:
        """What follows an event, in the order it was registered."""
        return self._reactions.get(event, [])

    def aggregate_of(self, category: str) -> Aggregate[Any, Any]:
        """The kind of aggregate of a category; raises KeyError if there is none."""
        return self._aggregates[category]

    def categories(self) -> list[str]:
        """The names of all kinds of aggregates, sorted."""
        return sorted(self._aggregates)

    def dump_state(self, state: Any) -> bytes:
        """A state as a snapshot keeps it (JSON)."""
        return json.encode(state)

    def load_state(self, category: str, state: bytes) -> Any:
        """The state of a snapshot; raises msgspec.DecodeError if it is not of this schema after all."""
        return json.decode(state, type=type(self._aggregates[category].initial))

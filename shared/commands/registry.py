"""The registration table: which function decides each command, and which reactions follow an event in its transaction."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.message import Message
from msgspec import Struct, json

from shared.commands.codec import Codec, Pair
from shared.folds.aggregate import Aggregate, Decision, Handler
from shared.folds.errors import Forbidden
from shared.platform.identity import Role

Prepare = Callable[[Any], Awaitable[Any]]
"""Work on a command's content before the decision, which must be pure: for example hashing a password."""


@dataclass(frozen=True, slots=True)
class Route:
    """How one command is decoded, decided and authorised."""

    pair: Pair
    handler: Handler
    roles: frozenset[Role]
    prepare: Prepare | None = None
    # Decisions of single tenants, by tenant.
    overrides: dict[str, Decision] = field(default_factory=dict)

    def decision(self, tenant: str) -> Decision:
        """The tenant's own decision function, or the default one."""
        return self.overrides.get(tenant, self.handler.decide)


class CommandRegistry:
    """The table of one service, filled by plain calls at start-up. A second registration of anything raises TypeError."""

    def __init__(self) -> None:
        self.codec = Codec()
        self._aggregates: dict[str, Aggregate[Any, Any]] = {}
        self._routes: dict[str, Route] = {}
        self._reactions: dict[type, list[Handler]] = {}
        self._readers: dict[str, frozenset[Role]] = {}

    def aggregate(
        self,
        aggregate: Aggregate[Any, Any],
        events: Mapping[type[Struct], type[Message]],
        *,
        readers: frozenset[Role] = frozenset(Role),
    ) -> None:
        """Adds an aggregate with its events, each with the message it is stored as.

        `readers` are the roles that may read its events, and the commands on it, in whatever way they are offered.
        """
        if aggregate.category in self._aggregates:
            raise TypeError(f"{aggregate.category} is registered twice")
        self._aggregates[aggregate.category] = aggregate
        self._readers[aggregate.category] = readers
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
        """Adds a command: its message, its decision, and the roles that may send it by any RPC.

        A command with `prepare` is refused inside a batch.
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
        """Adds a reaction that changes another aggregate in the event's transaction; a refusal there aborts the command."""
        self._check(handler)
        reactions = self._reactions.setdefault(event, [])
        if handler in reactions:
            raise TypeError(f"a reaction to {event.__name__} is registered twice")
        reactions.append(handler)

    def _check(self, handler: Handler) -> None:
        if self._aggregates.get(handler.aggregate.category) is not handler.aggregate:
            raise TypeError(f"{handler.aggregate.category} is not registered")

    def route(self, type_name: str) -> Route | None:
        """The route of a command's message type; None if it is not registered."""
        return self._routes.get(type_name)

    def commands(self) -> list[str]:
        """The full message names of all commands, sorted."""
        return sorted(self._routes)

    def reactions(self, event: type) -> list[Handler]:
        """The reactions to an event, in the order of their registration."""
        return self._reactions.get(event, [])

    def aggregate_of(self, category: str) -> Aggregate[Any, Any]:
        """The aggregate of a category; raises KeyError if there is none."""
        return self._aggregates[category]

    def refuse_reading(self, category: str, roles: frozenset[Role]) -> None:
        """Raises Forbidden (ROLE_MISSING) unless one of the roles may read what belongs to a category.

        Of a category that is not registered there is nothing to read.
        """
        readers = self._readers.get(category, roles)
        if readers.isdisjoint(roles):
            needed = ", ".join(sorted(readers))
            raise Forbidden("ROLE_MISSING", f"this needs one of the roles: {needed}", roles=needed)

    def categories(self) -> list[str]:
        """The categories of all aggregates, sorted."""
        return sorted(self._aggregates)

    def dump_state(self, state: Any) -> bytes:
        """A state as a snapshot stores it (JSON)."""
        return json.encode(state)

    def load_state(self, category: str, state: bytes) -> Any:
        """The state in a snapshot; raises msgspec.DecodeError if it does not fit the schema."""
        return json.decode(state, type=type(self._aggregates[category].initial))

"""The registration table: which function decides each command, and which reactions follow an event in its transaction.

The type checker proves each row: the aggregate's state and events, the struct, the decision and the id must fit each
other. `tests/unit/write_service/wrong_rows.py` has a row for each mistake that is refused.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic

from msgspec import json

from shared.commands.codec import Codecs, EventCodecs, MessageCodec
from shared.folds.aggregate import Aggregate, Content, Decision, Event, State
from shared.folds.errors import Forbidden
from shared.folds.upcasting import NONE, Upcasters
from shared.line.ends import ENDS
from shared.line.event_store import BOXED, UNBOXED
from shared.platform.identity import Role

Prepare = Callable[[str, Content], Awaitable[Content]]
"""Work on a tenant's command before the decision, which must be pure: for example hashing a password."""


SWITCHES_ID = "overrides"
"""The id of the aggregate that holds a tenant's switches (`shared/commands/overrides.py`)."""


@dataclass(frozen=True, slots=True)
class Override:
    """The decision of one tenant on a command, in place of the default one while the override of this name is on."""

    name: str
    decide: Decision[Any, Any, Any]


@dataclass(frozen=True, slots=True)
class Route:
    """How one command is decoded, decided and authorised. `id` reads the aggregate's id from its content."""

    codec: MessageCodec[Any]
    aggregate: Aggregate[Any, Any]
    id: Callable[[Any], str]
    decide: Decision[Any, Any, Any]
    roles: frozenset[Role]
    prepare: Prepare[Any] | None = None
    # Those of single tenants, by tenant.
    overrides: dict[str, Override] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reaction:
    """A decision that follows an event, on each aggregate whose id `ids` reads from the event.

    `read` is what the row of the table gave for `ids`. `tenant`: the only one that it is for, while the override `name` is on;
    None if it is for all.
    """

    aggregate: Aggregate[Any, Any]
    ids: Callable[[Any], tuple[str, ...]]
    read: Callable[[Any], object]
    decide: Decision[Any, Any, Any]
    tenant: str | None = None
    name: str = ""

    def is_same(self, other: Reaction) -> bool:
        """Whether one event of some tenant would get the same decision on the same aggregate from both.

        Two lambdas are the same if their code is.
        """
        return (self.aggregate, self.decide, _code(self.read)) == (other.aggregate, other.decide, _code(other.read)) and (
            self.tenant or other.tenant
        ) == (other.tenant or self.tenant)


def _code(function: Callable[[Any], object]) -> object:
    """What a function does, wherever it is written; a closure equals only itself."""
    code = getattr(function, "__code__", None)
    return function if code is None or code.co_freevars else (code.co_code, code.co_names, code.co_consts)


@dataclass(frozen=True, slots=True)
class BoxedWith:
    """An aggregate that is boxed with another, of whose events one names it: `id` reads its id from the event."""

    category: str
    id: Callable[[Any], str]


class AggregateRows(Generic[State, Event]):
    """Adds the rows of one aggregate to the table."""

    def __init__(self, registry: CommandRegistry, aggregate: Aggregate[State, Event]) -> None:
        self._registry = registry
        self._aggregate = aggregate

    def command(
        self,
        codec: MessageCodec[Content],
        decide: Decision[State, Content, Event],
        *,
        id: Callable[[Content], str],  # noqa: A002 - what a row says best
        roles: frozenset[Role],
        prepare: Prepare[Content] | None = None,
    ) -> None:
        """Adds a command: its decision, and the roles that may send it by any RPC.

        A command with `prepare` is refused inside a batch.
        """
        self._registry.codecs.add(codec)
        self._registry.routes[codec.type_name] = Route(codec, self._aggregate, id, decide, roles, prepare)

    def react(
        self,
        event: type[Content],
        decide: Decision[State, Content, Event],
        *,
        id: Callable[[Content], str],  # noqa: A002 - as above
        tenant: str | None = None,
        name: str = "",
    ) -> None:
        """Adds a reaction that changes this aggregate in the event's transaction; a refusal here aborts the command.

        A reaction that returns no event has only read the aggregate: when the batch is appended, the aggregate must be at
        the version that was read, or the command is decided again. With `tenant` it is for that tenant's events alone, and
        an override with a `name`.
        """
        self._add(event, Reaction(self._aggregate, lambda e: (id(e),), id, decide, tenant, name))

    def react_each(
        self,
        event: type[Content],
        decide: Decision[State, Content, Event],
        *,
        ids: Callable[[Content], tuple[str, ...]],
        tenant: str | None = None,
        name: str = "",
    ) -> None:
        """Adds a reaction on each of many aggregates, in the order of `ids`; an id that is named twice is one.

        One command, or one atomic batch, may reach REACHED_MAX aggregates by reactions (`shared/commands/decide.py`), and is
        refused beyond that.
        """
        self._add(event, Reaction(self._aggregate, lambda e: tuple(dict.fromkeys(ids(e))), ids, decide, tenant, name))

    def box_with(
        self,
        event: type[Content],
        other: Aggregate[Any, Any],
        *,
        id: Callable[[Content], str],  # noqa: A002 - as above
    ) -> None:
        """Boxes and unboxes with this aggregate what an event of its own names, for example a person's accounts."""
        type_name = self._registry.codecs.by_struct(event).type_name
        rules = self._registry.boxed_with(self._aggregate.category)
        if type_name in rules or self._registry.aggregate_or_none(other.category) is None:
            raise TypeError(f"{event.__name__} names what is boxed twice, or something that is not registered")
        rules[type_name] = BoxedWith(other.category, id)

    def _add(self, event: type[Any], reaction: Reaction) -> None:
        if bool(reaction.tenant) != bool(reaction.name):
            raise TypeError(f"a reaction to {event.__name__} that is for one tenant has a name, and no other has one")
        reactions = self._registry.reactions_by_event.setdefault(event, [])
        if any(map(reaction.is_same, reactions)):
            raise TypeError(f"a reaction to {event.__name__} is registered twice")
        reactions.append(reaction)

    def override(self, codec: MessageCodec[Content], decide: Decision[State, Content, Event], *, tenant: str, name: str) -> None:
        """Replaces the decision on a command for one tenant, while the override of this name is on."""
        route = self._registry.routes.get(codec.type_name)
        if route is None or route.aggregate is not self._aggregate:
            raise TypeError(f"{codec.type_name} is not registered for {self._aggregate.category}")
        if tenant in route.overrides:
            raise TypeError(f"{codec.type_name} is overridden twice for {tenant}")
        route.overrides[tenant] = Override(name, decide)


@dataclass(frozen=True, slots=True)
class Announced:
    """What a process tells a tenant's contacts; another service does it, and goes by the switch on the line."""

    name: str
    about: str
    description: str


class CommandRegistry:
    """The table of one service, filled by plain calls at start-up. A second registration of anything raises TypeError."""

    def __init__(self, upcasters: Upcasters = NONE) -> None:
        self.codecs = Codecs(upcasters)
        self.routes: dict[str, Route] = {}
        self.reactions_by_event: dict[type, list[Reaction]] = {}
        # What other services do otherwise for a tenant, by tenant.
        self.announcements: dict[str, list[Announced]] = {}
        # The aggregate of a tenant's switches, and whether its state has an override on. Without it all are on.
        self.switches: tuple[Aggregate[Any, Any], Callable[[Any, str], bool]] | None = None
        # Events between two snapshots, by category.
        self.snapshot_every: dict[str, int] = {}
        self._aggregates: dict[str, Aggregate[Any, Any]] = {}
        self._readers: dict[str, frozenset[Role]] = {}
        self._boxed_with: dict[str, dict[str, BoxedWith]] = {}
        self._never_boxed: set[str] = set()
        self._ended: dict[str, Callable[[Any], bool]] = {}
        self._purged_alone: set[str] = set()
        self._credentials: set[str] = set()
        self._events: dict[str, tuple[MessageCodec[Any], ...]] = {}

    def announcement(self, tenant: str, name: str, *, about: str, description: str) -> None:
        """Lets a tenant switch what another service announces: `about` names the event, or process type and notice."""
        own = self.announcements.setdefault(tenant, [])
        if name in {announced.name for announced in own}:
            raise TypeError(f"the announcement {name} is registered twice for {tenant}")
        own.append(Announced(name, about, description))

    def aggregate(
        self,
        aggregate: Aggregate[State, Event],
        events: EventCodecs[Event],
        *,
        readers: frozenset[Role] = frozenset(Role),
        snapshot_every: int = 100,
        boxable: bool = True,
        ended: Callable[[State], bool] | None = None,
        purged_alone: bool = True,
        credentials: bool = False,
    ) -> AggregateRows[State, Event]:
        """Adds an aggregate with its events; what is returned adds its commands and reactions.

        `readers` are the roles that may read its events, and the commands on it, in whatever way they are offered. Its state is
        saved at every version that `snapshot_every` divides. One that is not `boxable` stays out of the archive: something
        needs its state at any time. `ended` says in which states nothing more can come of it: only then may it be purged, by
        a rule of its tenant or, if not `purged_alone`, with another that it is boxed with. `credentials`: its id is the subject
        of a credential, which goes with it. Raises TypeError for a second registration, and ValueError for an interval below 1.
        """
        if aggregate.category in self._aggregates:
            raise TypeError(f"{aggregate.category} is registered twice")
        if snapshot_every < 1:
            raise ValueError(f"{aggregate.category}: a snapshot every {snapshot_every} events")
        self._aggregates[aggregate.category] = aggregate
        self.snapshot_every[aggregate.category] = snapshot_every
        self._readers[aggregate.category] = readers
        if not boxable:
            self._never_boxed.add(aggregate.category)
        if ended is not None:
            self._ended[aggregate.category] = ended
            if purged_alone:
                self._purged_alone.add(aggregate.category)
        if credentials:
            self._credentials.add(aggregate.category)
        self._events[aggregate.category] = tuple(events)
        for codec in events:
            self.codecs.add(codec)
        return AggregateRows(self, aggregate)

    def rows_of(self, aggregate: Aggregate[State, Event]) -> AggregateRows[State, Event]:
        """Adds to an aggregate that is registered; raises TypeError if it is not."""
        if self._aggregates.get(aggregate.category) is not aggregate:
            raise TypeError(f"{aggregate.category} is not registered")
        return AggregateRows(self, aggregate)

    def route(self, type_name: str) -> Route | None:
        """The route of a command's message type; None if it is not registered."""
        return self.routes.get(type_name)

    def roles(self, rpcs: Mapping[str, str]) -> dict[str, frozenset[Role]]:
        """The roles that may call each RPC, given the command that it sends; raises TypeError if a command has no row."""
        if missing := sorted(set(rpcs.values()) - set(self.routes)):
            raise TypeError(f"these commands have an RPC and no row: {missing}")
        return {rpc: self.routes[type_name].roles for rpc, type_name in rpcs.items()}

    def commands(self) -> list[str]:
        """The full message names of all commands, sorted."""
        return sorted(self.routes)

    def reactions(self, event: type, tenant: str) -> Sequence[Reaction]:
        """The reactions to an event of a tenant, in the order of their registration."""
        reactions = self.reactions_by_event.get(event, ())
        return [reaction for reaction in reactions if reaction.tenant is None or reaction.tenant == tenant]

    def aggregate_of(self, category: str) -> Aggregate[Any, Any]:
        """The aggregate of a category; raises KeyError if there is none."""
        return self._aggregates[category]

    def event_types(self) -> set[str]:
        """The full names of all events that are stored: those of the aggregates, of the archive, and the ends."""
        return {codec.type_name for codecs in self._events.values() for codec in codecs} | {BOXED, UNBOXED} | ENDS

    def aggregate_or_none(self, category: str) -> Aggregate[Any, Any] | None:
        """The aggregate of a category; None if there is none."""
        return self._aggregates.get(category)

    def boxed_with(self, category: str) -> dict[str, BoxedWith]:
        """What is boxed with an aggregate of a category, by the full name of the event that names it."""
        return self._boxed_with.setdefault(category, {})

    def is_boxable(self, category: str) -> bool:
        """Whether aggregates of a category may go into the archive."""
        return category not in self._never_boxed

    def is_purgeable(self, category: str) -> bool:
        """Whether a rule may purge aggregates of a category."""
        return category in self._purged_alone

    def has_ended(self, category: str, state: Any) -> bool:
        """Whether nothing more can come of an aggregate in this state. False if its row does not say so of any state."""
        ended = self._ended.get(category)
        return ended is not None and ended(state)

    def has_credentials(self, category: str) -> bool:
        """Whether the ids of a category's aggregates are subjects of credentials."""
        return category in self._credentials

    def events_of(self, category: str) -> tuple[MessageCodec[Any], ...]:
        """The codecs of a category's events; raises KeyError if there is no such category."""
        return self._events[category]

    def refuse_reading(self, category: str, roles: frozenset[Role]) -> None:
        """Raises Forbidden (ROLE_MISSING) unless one of the roles may read what belongs to a category.

        Of a category that is not registered there is nothing to read.
        """
        readers = self._readers.get(category, roles)
        if readers.isdisjoint(roles):
            needed = ", ".join(sorted(readers))
            raise Forbidden("ROLE_MISSING", f"this needs one of the roles: {needed}", roles=needed)

    def hidden_from(self, roles: frozenset[Role]) -> list[str]:
        """The categories that none of the roles may read."""
        return sorted(category for category, readers in self._readers.items() if readers.isdisjoint(roles))

    def dump_state(self, state: Any) -> bytes:
        """A state as a snapshot stores it (JSON)."""
        return json.encode(state)

    def load_state(self, category: str, state: bytes) -> Any:
        """The state in a snapshot; raises msgspec.DecodeError if it does not fit the schema."""
        return json.decode(state, type=type(self._aggregates[category].initial))

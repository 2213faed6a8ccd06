"""Overrides: what runs otherwise for one tenant, switched on and off at run time.

An override is a row of the registration table with a tenant and a name: a decision that replaces the default one, a reaction, or
what a process announces, which goes by the switch when it reads of it on the line (`shared/processes/switches.py`). Which of a
tenant's overrides are off is the state of an aggregate of that tenant, changed by a command. Whoever decides a command that an
override concerns reads that aggregate in the same transaction, so a switch takes effect between two commands of the line, in all
replicas at once. Tenants without overrides read nothing.

Two switches at once: they are commands on one aggregate, decided one after the other. Killed: a switch is on the line or not.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence

from msgspec import Struct

from foldline.v1 import override_pb2
from shared.commands import states
from shared.commands.codec import EventCodecs, MessageCodec
from shared.commands.registry import SWITCHES_ID, CommandRegistry
from shared.folds.aggregate import Aggregate, Decision, Meta
from shared.folds.errors import NotFound
from shared.platform.identity import Role
from shared.platform.postgres import Reads


class SwitchOverride(Struct, frozen=True, kw_only=True):
    """The command."""

    name: str
    on: bool


class OverrideSwitched(Struct, frozen=True, kw_only=True):
    """The event."""

    name: str
    on: bool


class Switches(Struct, frozen=True, kw_only=True):
    """The names of a tenant's overrides that are off."""

    off: tuple[str, ...] = ()


def evolve(switches: Switches, event: OverrideSwitched) -> Switches:
    """The switches after the event."""
    others = tuple(name for name in switches.off if name != event.name)
    return Switches(off=others if event.on else (*others, event.name))


SWITCHES = Aggregate(category="overrides", initial=Switches(), evolve=evolve)

SWITCH_OVERRIDE = MessageCodec(
    SwitchOverride,
    override_pb2.SwitchOverrideRequest,
    lambda message: SwitchOverride(name=message.name, on=message.on),
    lambda value: override_pb2.SwitchOverrideRequest(name=value.name, on=value.on).SerializeToString(),
)
OVERRIDE_SWITCHED = MessageCodec(
    OverrideSwitched,
    override_pb2.OverrideSwitched,
    lambda message: OverrideSwitched(name=message.name, on=message.on),
    lambda value: override_pb2.OverrideSwitched(name=value.name, on=value.on).SerializeToString(),
)
EVENTS: EventCodecs[OverrideSwitched] = EventCodecs(OVERRIDE_SWITCHED)


def add_switches(registry: CommandRegistry, *, roles: frozenset[Role]) -> None:
    """Lets the roles switch the overrides of their tenant. Without it all overrides are always on."""
    on = registry.aggregate(SWITCHES, EVENTS, readers=roles, boxable=False)
    on.command(SWITCH_OVERRIDE, _switch(registry), id=lambda c: SWITCHES_ID, roles=roles)
    registry.switches = SWITCHES, lambda switches, name: name not in switches.off


def _switch(registry: CommandRegistry) -> Decision[Switches, SwitchOverride, OverrideSwitched]:
    def switch(switches: Switches, command: SwitchOverride, meta: Meta) -> list[OverrideSwitched]:
        """An override that is so already stays so, without an event. Refusals: OVERRIDE_NOT_FOUND."""
        if command.name not in {override.name for override in overrides_of(registry, meta.tenant)}:
            raise NotFound("OVERRIDE_NOT_FOUND", "there is no override with this name for the tenant")
        if command.on == (command.name not in switches.off):
            return []
        return [OverrideSwitched(name=command.name, on=command.on)]

    return switch


def overrides_of(registry: CommandRegistry, tenant: str) -> list[override_pb2.Override]:
    """All overrides of a tenant, by name, as if all were on."""
    return sorted(_overrides(registry, tenant), key=lambda override: (override.name, override.type))


def _overrides(registry: CommandRegistry, tenant: str) -> Iterator[override_pb2.Override]:
    for route in registry.routes.values():
        if (other := route.overrides.get(tenant)) is not None:
            yield _described(other.name, override_pb2.OVERRIDE_KIND_DECISION, route.codec.type_name, other.decide)
    for event, reactions in registry.reactions_by_event.items():
        for reaction in reactions:
            if reaction.tenant == tenant:
                type_name = registry.codecs.by_struct(event).type_name
                yield _described(reaction.name, override_pb2.OVERRIDE_KIND_REACTION, type_name, reaction.decide)
    for own in registry.announcements.get(tenant, ()):
        kind = override_pb2.OVERRIDE_KIND_ANNOUNCEMENT
        yield override_pb2.Override(name=own.name, kind=kind, type=own.about, description=own.description, on=True)


def _described(name: str, kind: override_pb2.OverrideKind.ValueType, type_name: str, decide: object) -> override_pb2.Override:
    first = (inspect.getdoc(decide) or "").partition("\n")[0].partition(" Refusals")[0]
    return override_pb2.Override(name=name, kind=kind, type=type_name, description=first, on=True)


async def current(registry: CommandRegistry, reads: Reads, tenant: str) -> Sequence[override_pb2.Override]:
    """All overrides of a tenant, each as it is switched now. Raises AggregateUnreadable and ReleaseTooOld."""
    key = (tenant, SWITCHES.category, SWITCHES_ID)
    async with reads.connection() as connection:
        switches: Switches | states.Unreadable = (await states.load(connection, registry, [key]))[key].state
    if isinstance(switches, states.Unreadable):
        raise switches.refusal
    found = overrides_of(registry, tenant)
    for override in found:
        override.on = override.name not in switches.off
    return found

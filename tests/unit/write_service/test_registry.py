"""The registry against the contracts: nothing is forgotten on either side, and nothing is lost between them."""

from __future__ import annotations

import typing
from typing import Any

import pytest
from google.protobuf import struct_pb2
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from msgspec import Struct
from msgspec.structs import replace

from bank.v1 import account_pb2, transfer_pb2
from foldline.v1 import command_pb2
from saga_service.overrides import ANNOUNCEMENTS
from shared.commands.codec import OPTIONS, Codecs, EventCodecs, MessageCodec
from shared.commands.history import personal_fields
from shared.commands.registry import CommandRegistry
from shared.folds.aggregate import Aggregate
from shared.platform.identity import Role
from tests.support.checks.contracts import contracts
from tests.support.domains import trial
from tests.support.domains.messages import codec_of, message_of
from write_service.api import ROLES
from write_service.domain.transfer_types import Compensation
from write_service.passwords import Passwords
from write_service.registry import build_registry
from write_service.servicers import COMMANDS

BUS = build_registry(Passwords())
CODECS = {codec.type_name: codec for codec in BUS.codecs}
FILES = [file for file in contracts("bank/v1") if not file.__name__.endswith("_query_pb2")]

ENDED = {
    "person": replace(BUS.aggregate_of("person").initial, registered=True, closed=True),
    "account": replace(BUS.aggregate_of("account").initial, closed=True),
    "user": replace(BUS.aggregate_of("user").initial, started=True, deactivated=True),
}
"""States in which nothing more can come of an aggregate."""

_PYTHON_TYPES = {
    FieldDescriptor.CPPTYPE_STRING: str,
    FieldDescriptor.CPPTYPE_INT64: int,
    FieldDescriptor.CPPTYPE_INT32: int,
    FieldDescriptor.CPPTYPE_ENUM: int,
    FieldDescriptor.CPPTYPE_BOOL: bool,
}


def _expected_type(field: Any) -> Any:
    kind: Any = bytes if field.type == FieldDescriptor.TYPE_BYTES else _PYTHON_TYPES[field.cpp_type]
    if field.is_repeated:
        return tuple[kind, ...]
    return kind | None if field.has_presence else kind


@pytest.mark.parametrize("type_name", CODECS)
def test_a_struct_has_the_fields_of_its_message_with_their_types(type_name: str) -> None:
    """Names in both directions, types, and `| None` exactly where the message says `optional`."""
    codec = CODECS[type_name]
    fields = [field for field in codec.message.DESCRIPTOR.fields if field.name != OPTIONS]
    assert typing.get_type_hints(codec.struct) == {field.name: _expected_type(field) for field in fields}


@pytest.mark.parametrize("type_name", CODECS)
def test_a_struct_cannot_be_made_without_a_field_nor_changed(type_name: str) -> None:
    """A forgotten field raises, where protobuf would read zero."""
    struct: Any = CODECS[type_name].struct
    given = dict.fromkeys(struct.__struct_fields__, "x")
    value = struct(**given)
    for name in given:
        with pytest.raises(TypeError, match=name):
            struct(**{other: "x" for other in given if other != name})
        with pytest.raises(AttributeError):
            setattr(value, name, "y")
    with pytest.raises(TypeError):
        struct(*given.values())


@pytest.mark.parametrize("type_name", CODECS)
def test_a_value_survives_its_message(type_name: str) -> None:
    """Encoding and decoding gives the same value, for the least and for the most that the fields hold."""
    codec = CODECS[type_name]
    for values in (
        {str: "", int: 0, bool: False},
        {str: "ø€\U0001f600", int: 2**63 - 1, bool: True},
        {str: "b", int: -(2**63), bool: True},
    ):
        given = {field.name: _value(field, values) for field in codec.message.DESCRIPTOR.fields if field.name != OPTIONS}
        for value in (codec.struct(**given), codec.struct(**given | dict.fromkeys(_optional(codec)))):
            assert BUS.codecs.decode(type_name, codec.encode(value)) == value
            assert codec.encode(value) == codec.encode(value)


def _value(field: Any, values: dict[type, Any]) -> Any:
    """A value for a field: of an enum, one that it has."""
    if field.enum_type is not None:
        return field.enum_type.values[-1].number if values[int] else 0
    value = values[_PYTHON_TYPES[field.cpp_type]]
    return (value, value) if field.is_repeated else value


def _optional(codec: MessageCodec[Any]) -> list[str]:
    return [field.name for field in codec.message.DESCRIPTOR.fields if field.has_presence and field.name != OPTIONS]


@pytest.mark.parametrize("type_name", [name for name, codec in CODECS.items() if codec.redacted])
def test_what_is_redacted_is_not_shown(type_name: str) -> None:
    """Neither by whoever formats the command nor by what prints prettily."""
    codec = CODECS[type_name]
    shown: Any = codec.struct(**{name: f"the {name}" for name in codec.struct.__struct_fields__})
    for text in (repr(shown), str(list(shown.__rich_repr__()))):
        assert "the user_id" in text
        assert not any(f"the {name}" in text for name in codec.redacted)


def test_every_message_of_the_contracts_is_registered() -> None:
    """What RPCs answer with a receipt are commands, and so are the requests that have no RPC, which processes send.

    Other RPCs ask questions; every message that is left is an event.
    """
    commands, questions, others = set(), set(), set()
    for file in FILES:
        for service in file.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                if method.output_type.full_name == command_pb2.CommandReceipt.DESCRIPTOR.full_name:
                    commands.add(method.input_type.full_name)
                else:
                    questions |= {method.input_type.full_name, method.output_type.full_name}
        others |= {message.full_name for message in file.DESCRIPTOR.message_types_by_name.values()}
    others -= commands | questions
    of_processes = {name for name in others if name.endswith("Request")}
    assert {name for name in BUS.commands() if not name.startswith("foldline.")} == commands | of_processes
    assert {name for name in CODECS if not name.startswith("foldline.")} - set(BUS.commands()) == others - of_processes
    roles = {name: route.roles for name in BUS.commands() if (route := BUS.route(name)) is not None}
    assert {name for name in roles if roles[name] == {Role.PROCESS}} == of_processes


def test_the_roles_of_a_command_are_said_by_its_row_alone() -> None:
    """The RPC of a command has the roles of the command's row, and no other table names it."""
    roles = BUS.roles(COMMANDS)
    assert set(roles).isdisjoint(ROLES)
    assert roles["bank.v1.AccountService/FreezeAccount"] == {Role.TENANT_ADMIN, Role.OPERATOR, Role.PROCESS}
    for rpc, type_name in COMMANDS.items():
        route = BUS.route(type_name)
        assert route is not None
        assert roles[rpc] is route.roles
    with pytest.raises(TypeError, match=r"an RPC and no row: \['trial.Nothing'\]"):
        BUS.roles({"trial.Trial/Nothing": "trial.Nothing"})


def test_the_domains_compensations_are_those_of_the_contract() -> None:
    """The domain cannot import the contract, so both have the numbers."""
    named = {value.name.removeprefix("COMPENSATION_"): value.number for value in transfer_pb2.Compensation.DESCRIPTOR.values}
    assert named == {"UNSPECIFIED": 0, **{each.name: each.value for each in Compensation}}


def test_every_command_begins_with_its_options_and_no_event_has_any() -> None:
    """Options are what a client says about a command; they are no part of what it asks."""
    for type_name, codec in CODECS.items():
        first = codec.message.DESCRIPTOR.fields_by_number[1]
        is_command = BUS.route(type_name) is not None
        assert (first.name == OPTIONS) == is_command
        assert is_command == (OPTIONS in codec.message.DESCRIPTOR.fields_by_name)


class Deposit(Struct, frozen=True, kw_only=True):
    account_id: str
    amount_minor: int


class DepositWithNote(Struct, frozen=True, kw_only=True):
    account_id: str
    amount_minor: int
    note: str


@pytest.mark.parametrize(
    ("struct", "message_like"),
    [(Deposit, DepositWithNote), (DepositWithNote, Deposit)],
    ids=["missing here", "missing there"],
)
def test_a_mismatch_raises_in_both_directions(struct: type[Struct], message_like: type[Struct]) -> None:
    """A field that only one side has stops the service at its start, whichever side it is."""
    message = message_of(message_like, name=f"Mismatch{message_like.__name__}")
    with pytest.raises(TypeError, match="differ"):
        codec_of(struct, message)


def test_a_message_within_a_message_is_refused() -> None:
    """Nor a map, which protobuf holds for many of them: the same content could have other bytes, and another fingerprint."""

    class Item(Struct):
        command: bytes
        tenant: str
        on_behalf_of: str
        causation_id: str
        traceparent: str

    class Map(Struct):
        fields: dict[str, str]

    with pytest.raises(TypeError, match=r"not flat: \['command'\]"):
        codec_of(Item, command_pb2.BatchItem)
    with pytest.raises(TypeError, match=r"not flat: \['fields'\]"):
        codec_of(Map, struct_pb2.Struct)


@pytest.fixture(scope="module")
def messages() -> tuple[type[Message], type[Message]]:
    """Two messages with the same fields."""
    return message_of(Deposit, name="One"), message_of(Deposit, name="Other")


def test_a_struct_and_a_message_have_one_codec_only(messages: tuple[type[Message], type[Message]]) -> None:
    """Else the same bytes could be read as two things, or the same thing be written as two."""

    class Twin(Struct, frozen=True):
        account_id: str
        amount_minor: int

    codecs = Codecs()
    codecs.add(codec_of(Deposit, messages[0]))
    with pytest.raises(TypeError, match="twice"):
        codecs.add(codec_of(Deposit, messages[1]))
    with pytest.raises(TypeError, match="twice"):
        codecs.add(codec_of(Twin, messages[0]))


class Evolved(Struct, frozen=True, kw_only=True):
    """With fields of a later day, and one of many values."""

    name: str
    nickname: str | None
    age: int | None
    account_ids: tuple[str, ...]


def test_a_field_that_was_added_later_is_none_where_it_is_missing() -> None:
    """Absent is not empty and not zero, in both directions; many values are a tuple."""
    codec = codec_of(Evolved, message_of(Evolved))
    for value in (
        Evolved(name="a", nickname=None, age=None, account_ids=()),
        Evolved(name="", nickname="", age=0, account_ids=("a1", "", "a1")),
    ):
        payload = codec.encode(value)
        assert codec.decode(codec.message.FromString(payload)) == value
    assert codec.decode(codec.message.FromString(b"")) == Evolved(name="", nickname=None, age=None, account_ids=())


def test_a_struct_or_type_that_was_never_added_is_unknown() -> None:
    """Nothing is guessed."""
    with pytest.raises(KeyError):
        BUS.codecs.of(Deposit(account_id="a", amount_minor=1))
    with pytest.raises(KeyError):
        BUS.codecs.decode("bank.v1.Nothing", b"")


def test_uuids_become_lower_case_and_nothing_else_does() -> None:
    """The same account by another spelling is the same account; a name is left as it is."""
    message = account_pb2.OpenAccountRequest(
        account_id="ABCDEF00-0000-4000-8000-00000000000A", owner_id="", currency="USD", name="Blue"
    )
    decoded = CODECS["bank.v1.OpenAccountRequest"].decode(message)
    assert (decoded.account_id, decoded.name) == ("abcdef00-0000-4000-8000-00000000000a", "Blue")


ELSEWHERE = Aggregate(category="elsewhere", initial=trial.Counter(), evolve=trial.evolve)


def test_registering_twice_or_for_an_unknown_aggregate_raises() -> None:
    """A table with two answers is found at the start of the service, not by its users."""
    bus = trial.build_registry()
    on = bus.rows_of(trial.COUNTER)
    with pytest.raises(TypeError, match="counter is registered twice"):
        bus.aggregate(trial.COUNTER, trial.EVENTS)
    with pytest.raises(TypeError, match="twice"):
        on.command(trial.ADD, trial.add, id=lambda c: c.counter_id, roles=trial.USERS)
    with pytest.raises(TypeError, match="elsewhere is not registered"):
        bus.rows_of(ELSEWHERE)
    on.override(trial.ADD, trial.twice_as_much, tenant="umbrella", name="other")
    with pytest.raises(TypeError, match="overridden twice for umbrella"):
        on.override(trial.ADD, trial.twice_as_much, tenant="umbrella", name="other")


def test_events_of_another_aggregate_raise() -> None:
    """An event is stored in the stream of one category, so it has one row."""
    with pytest.raises(TypeError, match="twice"):
        trial.build_registry().aggregate(ELSEWHERE, trial.EVENTS)


def test_the_same_reaction_twice_raises() -> None:
    """Else money would move twice for one event."""
    on = trial.build_registry().rows_of(trial.COUNTER)
    with pytest.raises(TypeError, match="twice"):
        on.react(trial.Linked, trial.link, id=lambda e: e.counter_id)
    on.react(trial.Moved, trial.receive, id=lambda e: e.counter_id)  # on another aggregate it is another reaction
    with pytest.raises(TypeError, match="twice"):
        on.react_each(trial.Shared, trial.receive_share, ids=lambda e: e.to_ids)


def test_a_reaction_of_a_tenant_that_all_have_raises() -> None:
    """It would run twice for that tenant; each of two tenants may have it."""
    on = trial.build_registry().rows_of(trial.COUNTER)
    with pytest.raises(TypeError, match="twice"):
        on.react(trial.Moved, trial.receive, id=lambda e: e.to_id, tenant="umbrella", name="linked")
    on.react(trial.Added, trial.link, id=lambda e: e.counter_id, tenant="umbrella", name="linked")  # type: ignore[arg-type]
    on.react(trial.Added, trial.link, id=lambda e: e.counter_id, tenant="acme", name="linked")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="twice"):
        on.react(trial.Added, trial.link, id=lambda e: e.counter_id)  # type: ignore[arg-type]


def test_an_override_of_a_command_that_has_no_row_raises() -> None:
    """A forgotten row is found at the start of the service, and so is the row of another aggregate."""
    registry = CommandRegistry()
    on = registry.aggregate(trial.COUNTER, trial.EVENTS)
    with pytest.raises(TypeError, match=r"trial.Add is not registered for counter"):
        on.override(trial.ADD, trial.twice_as_much, tenant="umbrella", name="other")
    elsewhere = trial.build_registry().aggregate(ELSEWHERE, EventCodecs())
    with pytest.raises(TypeError, match=r"trial.Add is not registered for elsewhere"):
        elsewhere.override(trial.ADD, trial.twice_as_much, tenant="umbrella", name="other")


def test_an_override_is_for_its_tenant_alone() -> None:
    """Everybody else is decided for as before."""
    bus = trial.build_registry()
    bus.rows_of(trial.COUNTER).override(trial.ADD, trial.twice_as_much, tenant="umbrella", name="other")
    add, chain = bus.route("trial.Add"), bus.route("trial.Chain")
    assert add is not None
    assert chain is not None
    assert {tenant: (own.name, own.decide) for tenant, own in add.overrides.items()} == {
        "umbrella": ("other", trial.twice_as_much)
    }
    assert add.decide is trial.add
    assert chain.overrides == {}


def test_all_that_the_saga_service_announces_can_be_switched() -> None:
    """Each of its announcements is named here for its tenant, and nothing else is; two of a name are one switch too few."""
    named = {(tenant, own.name) for tenant, announced in BUS.announcements.items() for own in announced}
    assert named == ANNOUNCEMENTS.names
    with pytest.raises(TypeError, match="registered twice"):
        build_registry(Passwords()).announcement("umbrella", "large-transfer-notice", about="", description="")


@pytest.mark.parametrize("category", ["account", "login", "person", "suspense", "transfer", "user"])
def test_a_state_survives_its_snapshot(category: str) -> None:
    """Whatever is in it comes back equal, the initial state too."""
    states: dict[str, Any] = {
        "account": {
            "opened": True,
            "owner_id": "p\u00f8",
            "currency": "USD",
            "balance_minor": 2**63 - 1,
            "frozen": True,
            "closed": True,
        },
        "login": {"holder_id": "u1", "confirmed": True, "expires_at_ms": 2**63 - 1},
        "person": {"registered": True, "closed": True, "name": '\u20ac"\\\n\U0001f600', "account_ids": ("a1", "a2")},
        "suspense": {"balance_minor": 2**63 - 1, "wraps": 2**63 - 1},
        "transfer": {"started": True, "ended": True},
        "user": {
            "started": True,
            "succeeded": True,
            "failed": True,
            "deactivated": True,
            "login_id": "l1",
            "email": "\u20ac@example.com",
            "roles": ("tenant_admin", "user"),
        },
    }
    initial = BUS.aggregate_of(category).initial
    assert initial.__struct_config__.frozen  # many may hold it at once
    assert set(initial.__struct_fields__) == set(states[category])
    for state in (initial, replace(initial, **states[category])):
        assert BUS.load_state(category, BUS.dump_state(state)) == state


def test_an_interval_of_snapshots_is_at_least_one() -> None:
    """Of zero, every command on the aggregate would fail."""
    with pytest.raises(ValueError, match="counter: a snapshot every 0 events"):
        trial.build_registry(snapshot_every=0)


NOT_PERSONAL = {"currency", "owner_id", "login_id", "holder_id", "account_ids", "roles", "off"}
"""Fields of states that hold text and say nothing about a person but an id."""


def test_what_is_personal_in_a_state_is_known_by_its_name() -> None:
    """A state's field with text has the name of a personal field of its events, or is known to be none."""
    found = {}
    for category in ("person", "account", "transfer", "user", "login", "suspense", "overrides", "retention"):
        state = BUS.aggregate_of(category).initial
        texts = {name for name in state.__struct_fields__ if isinstance(getattr(state, name), str | tuple)}
        found[category] = sorted(texts & {*personal_fields(BUS, category)})
        assert texts <= NOT_PERSONAL | {*found[category]}
    assert {category: names for category, names in found.items() if names} == {"person": ["name"], "user": ["email"]}


def test_only_what_has_ended_is_purged_and_accounts_only_with_their_owner() -> None:
    """An account with money on it has not ended, whatever else is said of it; nor has anything that was not closed."""
    categories = {"person", "account", "user", "login", "transfer", "suspense", "overrides", "retention"}
    assert {category for category in categories if BUS.is_purgeable(category)} == {"person", "user"}
    for category in categories:
        initial = BUS.aggregate_of(category).initial
        assert not BUS.has_ended(category, initial)
    for category, state in ENDED.items():
        assert BUS.has_ended(category, state)
    assert not BUS.has_ended("account", replace(ENDED["account"], balance_minor=1))
    assert not BUS.has_ended("account", replace(ENDED["account"], closed=False))
    assert {category for category in categories if BUS.has_credentials(category)} == {"user"}

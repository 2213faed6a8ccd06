"""How a summary and the contract of its service belong together: the Get, Explain, List and Watch RPCs, and who may call them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Generic, cast

import grpc
from buf.validate import validate_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass
from grpc import aio

from shared.folds.projection import Group
from shared.folds.summary import Summary
from shared.folds.table import Row
from shared.platform.identity import Role

_SCALARS = {FieldDescriptor.TYPE_STRING: "string", FieldDescriptor.TYPE_ENUM: "enum", FieldDescriptor.TYPE_BOOL: "bool"}
"""The types of a filter's fields that are no messages."""
_RULES: Any = validate_pb2.DESCRIPTOR.extensions_by_name["field"]


@dataclass(frozen=True, slots=True)
class SummaryRpcs(Generic[Row]):
    """A row of a service's table: a summary, the group of its tables, and who may ask.

    Raises TypeError if its `.proto` and the summary do not fit each other: another id, filter or order.
    """

    summary: Summary[Row]
    group: Group
    roles: frozenset[Role]

    def __post_init__(self) -> None:
        name, shown = self.summary.name, cast("Descriptor", self.summary.message.DESCRIPTOR)
        _check("stale" in shown.fields_by_name, f"{shown.full_name} has no field stale")
        asked, answered = self.get_rpc.input_type, self.get_rpc.output_type
        _check(f"{name}_id" in asked.fields_by_name, f"{asked.full_name} has no {name}_id")
        _check(shown_field(answered).message_type is shown, f"{answered.full_name} has no {shown.name}")
        _check("as_of" in asked.fields_by_name, f"{asked.full_name} has no as_of")
        _check("origin" in answered.fields_by_name, f"{answered.full_name} has no origin")
        asked, answered = self.explain_rpc.input_type, self.explain_rpc.output_type
        _check(f"{name}_id" in asked.fields_by_name, f"{asked.full_name} has no {name}_id")
        _check(shown_field(answered).name == "changes", f"{answered.full_name} has no changes")
        masked = (self.get_rpc.input_type, self.list_rpc.input_type)
        _check(all("read_mask" in each.fields_by_name for each in masked), f"{self.service.full_name} has no read_mask")
        asked, answered = self.watch_rpc.input_type, self.watch_rpc.output_type
        _check(f"{name}_id" in asked.fields_by_name, f"{asked.full_name} has no {name}_id")
        _check(shown_field(answered).message_type is shown, f"{answered.full_name} has no {shown.name}")
        asked, answered = self.watch_list_rpc.input_type, self.watch_list_rpc.output_type
        change = answered.fields_by_name["changes"].message_type.fields_by_name
        _check({f"{name}_id", "kind"} <= set(change), f"{answered.full_name} has changes without {name}_id and kind")
        _check(change[name].message_type is shown, f"{answered.full_name} has changes without {shown.name}")
        its_filter = asked.fields_by_name["filter"].message_type
        asked, answered = self.list_rpc.input_type, self.list_rpc.output_type
        _check(shown_field(answered).message_type is shown, f"{answered.full_name} has no {shown.name}")
        filters = [field.name for field in asked.fields_by_name["filter"].message_type.fields]
        _check(asked.fields_by_name["filter"].message_type is its_filter, f"{self.watch_list_rpc.name} has another filter")
        _check(filters == list(self.summary.filters), f"{asked.full_name} filters by {filters}")
        rules = asked.fields_by_name["order_by"].GetOptions().Extensions[_RULES]
        orders = set(getattr(rules.string, "in"))
        _check(orders == set(orders_of(self.summary)), f"{asked.full_name} is ordered by {sorted(orders)}")
        for field in asked.fields_by_name["filter"].message_type.fields:
            self._check_filter(field)

    def _check_filter(self, field: FieldDescriptor) -> None:
        by = self.summary.filters[field.name]
        given = field.message_type.full_name if field.message_type else _SCALARS.get(field.type, "")
        _check(given == by.given, f"{field.full_name} is {given}, and the summary filters by {by.given}")
        if by.texts is not None and field.enum_type is not None:
            values = {value.number for value in field.enum_type.values} - {0}
            _check(values == set(by.texts), f"{self.summary.name} has no text for each {field.enum_type.full_name}")

    @property
    def service(self) -> ServiceDescriptor:
        """The service that shows the summary: the one of the `.proto` that declares its message."""
        [service] = self.summary.message.DESCRIPTOR.file.services_by_name.values()
        return cast("ServiceDescriptor", service)

    def add_to_server(self, servicer: Any, server: aio.Server) -> None:
        """Adds the service to a server, as the function that is generated of its `.proto` does."""
        handlers = {method.name: _handler(getattr(servicer, method.name), method) for method in self.service.methods}
        server.add_registered_method_handlers(self.service.full_name, handlers)

    @property
    def get_rpc(self) -> Any:
        """The RPC that shows one: GetAccount of an account."""
        return self._rpc("Get", self.summary.name.title().replace("_", ""))

    @property
    def explain_rpc(self) -> Any:
        """The RPC that shows which events made one what it is: ExplainAccount."""
        return self._rpc("Explain", self.summary.name.title().replace("_", ""))

    @property
    def list_rpc(self) -> Any:
        """The RPC that shows many: ListAccounts."""
        return self._rpc("List", self.summary.name.title().replace("_", "") + "s")

    @property
    def watch_rpc(self) -> Any:
        """The RPC that shows one whenever it changes: WatchAccount."""
        return self._rpc("Watch", self.summary.name.title().replace("_", ""))

    @property
    def watch_list_rpc(self) -> Any:
        """The RPC that shows many whenever they change: WatchAccounts."""
        return self._rpc("Watch", self.summary.name.title().replace("_", "") + "s")

    def _rpc(self, verb: str, noun: str) -> Any:
        if (rpc := self.service.methods_by_name.get(verb + noun)) is None:
            raise TypeError(f"{self.service.full_name} has no {verb}{noun}")
        return rpc


def groups_of(rows: Iterable[SummaryRpcs[Any]]) -> dict[str, Group]:
    """The groups of tables that summaries show, by name, each once. Raises TypeError for two with one name."""
    groups: dict[str, Group] = {}
    for row in rows:
        _check(groups.setdefault(row.group.name, row.group) is row.group, f"two groups of tables are named {row.group.name}")
    return groups


def roles_of(rows: Iterable[SummaryRpcs[Any]]) -> dict[str, frozenset[Role]]:
    """The roles that may call the Get, Explain, List and Watch RPCs of summaries."""
    every = attrgetter("get_rpc", "explain_rpc", "list_rpc", "watch_rpc", "watch_list_rpc")
    rpcs = ((row, rpc) for row in rows for rpc in every(row))
    return {f"{row.service.full_name}/{rpc.name}": row.roles for row, rpc in rpcs}


def watch_limits(rows: Iterable[SummaryRpcs[Any]], seconds: float) -> dict[str, float]:
    """How long the calls of the Watch RPCs may take."""
    rpcs = ((row, rpc) for row in rows for rpc in (row.watch_rpc, row.watch_list_rpc))
    return {f"{row.service.full_name}/{rpc.name}": seconds for row, rpc in rpcs}


def orders_of(summary: Summary[Any]) -> dict[str, tuple[str, bool]]:
    """The column, and whether it is descending, of each value that `order_by` may have."""
    orders = {name: (column, False) for name, column in summary.orders.items()}
    return {"": next(iter(orders.values())), **orders, **{f"{name} desc": (column, True) for name, (column, _) in orders.items()}}


def shown_field(answer: Descriptor) -> FieldDescriptor:
    """The field of an answer that holds what is shown: the first."""
    return answer.fields[0]


def _handler(serve: Any, method: MethodDescriptor) -> Any:
    made: Any = grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
    asked, answered = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
    return made(serve, request_deserializer=asked.FromString, response_serializer=answered.SerializeToString)


def _check(fits: bool, text: str) -> None:
    if not fits:
        raise TypeError(text)

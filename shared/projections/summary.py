"""Answers the Get, Explain, List and Watch RPCs of a summary: consistency token, tenant, query, pages, and what is not found.

Every query runs in a transaction that first names the tenant, because the tables' policies show the rows of that tenant
and no others. The queries name it too, so that they use the indexes; were one to forget it, it would show nothing of
another tenant. Names, never values, are put into the text of a query.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Generic, get_type_hints

from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from foldline.v1 import as_of_pb2
from shared.folds.errors import NotFound, Refusal, Rejected
from shared.folds.summary import Condition
from shared.folds.table import Row
from shared.line.consistency import ConsistencyGate, Token
from shared.platform.fairness import Room
from shared.platform.identity import current_call
from shared.platform.postgres import Connection, Reads
from shared.platform.together import rows_of_last
from shared.projections import watched_lists
from shared.projections.filtering import branches_of, conditions_of, needed_behind, order_of
from shared.projections.masks import mask_of, only
from shared.projections.past_events import PastEvents
from shared.projections.summary_rpcs import SummaryRpcs, orders_of, shown_field
from shared.projections.time_travel import TimeTravel
from shared.projections.watch import Shown, Watches, WatchLimits, digest_of, serve
from shared.projections.watched_list import Change, Found
from shared.rpc import pages
from shared.rpc.bounds import rules_broken

# Whether events wait for this row: none do, as a rule, and the index is empty. Not EXISTS, for which PostgreSQL may read all keys
# that the tenant has parked, to look up each row of the page among them.
_STALE = """(SELECT true FROM parked_keys k WHERE k.tenant = p.tenant AND k.row_id = {row} AND k.group_name = '{group}'
  AND k.serves LIMIT 1) IS NOT NULL"""
# Asked once for a page, so that one of a tenant without parked keys, as most are, looks up none of its rows.
_ANY_STALE = "EXISTS (SELECT FROM parked_keys k WHERE k.tenant = %(tenant)s)"
# As of the same moment as the row: how many changes of the group there were, and where its tables are.
_PLACE = """coalesce((SELECT h.seq FROM row_change_heads h WHERE h.group_name = '{group}' AND h.shard = {shard}), 0),
  coalesce((SELECT c.position FROM checkpoints c WHERE c.group_name = '{group}' AND c.shard = {shard} AND c.serves), 0),
  coalesce((SELECT c.epoch FROM checkpoints c WHERE c.group_name = '{group}' AND c.shard = {shard} AND c.serves), '')"""
# For the transaction alone: at its end the tenant is forgotten.
_AS_TENANT = "SELECT set_config('app.tenant', %(tenant)s, true)"
STALE_TRAILER = ("foldline-stale", "true")


class SummaryServicer(Generic[Row]):
    """The servicer of a summary: `get`, `explain`, `list`, `watch` and `watch_list` under the names of their RPCs."""

    def __init__(
        self,
        rpcs: SummaryRpcs[Row],
        reads: Reads,
        gate: ConsistencyGate,
        shard: int = 1,
        limits: WatchLimits | None = None,
        lists: WatchLimits | None = None,
        past: tuple[PastEvents, Room] | None = None,
    ) -> None:
        """`limits` and `lists`: how many watches there may be, and how many lists that are watched.

        `past` is where events of the past are read, and the room for folding them; without it there is no past.
        """
        summary = rpcs.summary
        self._summary = summary
        self.reads = reads
        self.gate = gate
        self._id = f"{summary.name}_id"
        self._orders = orders_of(summary)
        self._row = summary.source.row
        kinds = get_type_hints(self._row)
        self._kinds = {column: kinds[column] for column in summary.orders.values()}
        columns = ", ".join(self._row._fields)  # type: ignore[attr-defined]
        self._group = rpcs.group.name
        stale = _STALE.format(row=f"p.{self._id}", group=self._group)
        rows = f"FROM {summary.source.sql} WHERE p.tenant = %(tenant)s"
        self._select = f"SELECT {columns}, {stale} {rows}"
        self._select_page = f"SELECT {columns}, {_ANY_STALE} AND {stale} AS stale {rows}"
        self._list_name = rpcs.list_rpc.name
        self._kind = shown_field(rpcs.get_rpc.output_type).message_type
        self._one, self._got = shown_field(rpcs.get_rpc.output_type).name, _made(rpcs.get_rpc.output_type)
        self._many, self._listed = shown_field(rpcs.list_rpc.output_type).name, _made(rpcs.list_rpc.output_type)
        self._watched = _made(rpcs.watch_rpc.output_type)
        self._shard = shard
        self._limits = limits or WatchLimits(100, 1000)
        place = _PLACE.format(group=self._group, shard=shard)
        self._select_placed = f"SELECT {columns}, {stale}, {place} {rows}"
        self._watched_list = _made(rpcs.watch_list_rpc.output_type)
        self._change = _made(rpcs.watch_list_rpc.output_type.fields_by_name["changes"].message_type)
        self.watches = Watches(reads, self._group, shard, self._placed, self, lists or WatchLimits(50, 150, "watched lists"))
        self._past = past and TimeTravel(summary, rpcs.group, *past)
        self._explain_name, self._explained = rpcs.explain_rpc.name, _made(rpcs.explain_rpc.output_type)
        setattr(self, rpcs.get_rpc.name, self.get)
        setattr(self, rpcs.explain_rpc.name, self.explain)
        setattr(self, rpcs.watch_rpc.name, self.watch)
        setattr(self, rpcs.list_rpc.name, self.list)
        setattr(self, rpcs.watch_list_rpc.name, self.watch_list)

    async def get(self, request: Any, context: Any) -> Any:
        """The answer of the Get RPC. Raises NotFound for an id that the tenant does not have, or did not have then."""
        mask = mask_of(request, self._kind)
        if request.HasField("as_of"):
            return await self._get_past(request, context, mask)
        await self.gate.wait(request.consistency_token, tenant(), context.time_remaining())
        shown = await self.existing(getattr(request, self._id))
        if shown.stale:
            tell_stale(context)
        return self._got(**{self._one: only(mask, shown)})

    @property
    def past(self) -> TimeTravel[Row]:
        """The rows as they were. Raises Rejected (HISTORY_NOT_CONFIGURED)."""
        if self._past is None:
            raise Rejected("HISTORY_NOT_CONFIGURED", "this instance was not told where the write service is, which has the past")
        return self._past

    async def _get_past(self, request: Any, context: Any, mask: FieldMask | None) -> Any:
        row, origin, stale = await self.existed(getattr(request, self._id), request.as_of, context)
        shown: Any = self._summary.view(row)
        if stale:
            shown.stale = True
            tell_stale(context)
        return self._got(**{self._one: only(mask, shown), "origin": origin})

    async def existed(self, id_: str, as_of: as_of_pb2.AsOf, context: Any) -> tuple[Row, as_of_pb2.RowOrigin, bool]:
        """The row of an id in the caller's tenant as of then, its origin, and whether it is stale.

        Raises as `existing` and TimeTravel.as_of do.
        """
        past = await self.past.as_of(id_.lower(), as_of, context)
        if past.row is None:
            raise self._absent(id_.lower(), past.stale)
        return past.row, past.origin, past.stale

    async def explain(self, request: Any, context: Any) -> Any:
        """The answer of the Explain RPC: a page of the events that changed a row. Raises NotFound as `get` does."""
        id_, size, field = getattr(request, self._id).lower(), request.page_size or pages.SIZE_DEFAULT, request.field
        if field and field not in self.past.fields():
            raise rules_broken(("field", f"must be one of {', '.join(self.past.fields())}"))
        as_of = request.as_of if request.HasField("as_of") else None
        query = (self._explain_name, tenant(), id_, field, "" if as_of is None else as_of.SerializeToString().hex())
        keys = pages.decode(query, request.page_token, (int,))
        before = keys[0] if keys else None
        found = await self.past.explain(id_, as_of, context, field=field, before=before, limit=size + 1)
        if not found.there:
            raise self._absent(id_, found.stale)
        if found.stale:
            tell_stale(context)
        cut, following = pages.cut(found.changes, size, query, lambda change: (change[0],))
        changes = [change for _, change in cut]
        return self._explained(changes=changes, next_page_token=following, stale=found.stale)

    async def existing(self, id_: str) -> Any:
        """What is shown of an id in the caller's tenant.

        Raises NotFound if there is none, and Rejected ROW_PARKED if there is none since its first event cannot be applied.
        """
        id_ = id_.lower()
        rows = await in_tenant(self.reads, tenant(), f"{self._select} AND p.{self._id} = %(id)s", {"id": id_})
        if rows:
            return self._shown(rows[0])
        raise self._absent(id_, await self.is_stale(id_))

    def _absent(self, id_: str, stale: bool) -> Refusal:
        """The refusal of an id without a row; `stale` if its first event cannot be applied."""
        name = self._summary.name
        if stale:
            return Rejected("ROW_PARKED", f"events of {name} {id_} cannot be applied, so it cannot be shown; operators see why")
        return NotFound(f"{name.upper()}_NOT_FOUND", f"there is no {name} {id_}")

    async def is_stale(self, id_: str) -> bool:
        """Whether events of this id wait behind one that cannot be applied."""
        query = "SELECT " + _STALE.format(row="%(id)s", group=self._group).replace("p.tenant", "%(tenant)s")
        [(stale,)] = await in_tenant(self.reads, tenant(), query, {"id": id_})
        return bool(stale)

    def _shown(self, row: tuple[Any, ...]) -> Any:
        """The message of a row, whose last column says whether it is stale."""
        shown: Any = self._summary.message()
        self._fill(shown, row)
        return shown

    def _fill(self, shown: Any, row: tuple[Any, ...]) -> None:
        self._summary.show(self._row(*row[:-1]), shown)
        if row[-1]:
            shown.stale = True

    async def watch(self, request: Any, context: Any) -> None:
        """Writes the answers of the Watch RPC, until the caller goes or an exception: see `shared.projections.watch`."""
        row = (tenant(), getattr(request, self._id).lower())

        async def first() -> Shown:
            found = await self._placed(row[0], [row[1]])
            return found[row[1]] if row[1] in found else Shown(0, Token(0, "", 0), await self.existing(row[1]), "")

        async def write(message: Message | None, token: str) -> None:
            shown = {} if message is None else {self._one: message}
            await context.write(self._watched(**shown, resume_token=token))

        with self._limits.taken(row[0]):
            await serve(self.watches, self.gate, row, first, (request.resume_token, request.consistency_token), write)

    async def _placed(self, tenant: str, ids: Collection[str]) -> dict[str, Shown]:
        """The rows of a tenant with these ids, each with its place."""
        found = {}
        sql = f"{self._select_placed} AND p.{self._id} = ANY(%(ids)s)"
        for *row, seq, position, epoch in await in_tenant(self.reads, tenant, sql, {"ids": list(ids)}):
            message = self._shown(tuple(row))
            at = Token(self._shard, epoch, position)
            found[getattr(message, self._id)] = Shown(seq, at, message, digest_of(message))
        return found

    async def watch_list(self, request: Any, context: Any) -> None:
        """Writes the answers of the RPC that watches a list: see `shared.projections.watched_lists`."""
        found, bound = conditions_of(self._summary.filters, request.filter)
        order = self._order("", found)
        key = "\0".join((self._list_name, *bound))
        conditions = [condition for conditions in found.values() for condition in conditions]

        async def write(changes: Sequence[tuple[str, Change]], begins_anew: bool, token: str) -> None:
            told = [self._change(**{"kind": kind, self._id: id_, self._one: message}) for id_, (kind, message) in changes]
            await context.write(self._watched_list(changes=told, begins_anew=begins_anew, resume_token=token))

        with self._limits.taken(tenant()):
            query, tokens = (tenant(), key, conditions, order), (request.resume_token, request.consistency_token)
            await watched_lists.serve(self.watches.lists, self.gate, query, tokens, write, self.watches.started)

    async def rows(self, connection: Connection, tenant: str, ids: Collection[str]) -> Sequence[Found]:
        """The rows of a tenant with these ids, in an open transaction."""
        return await self._found(connection, tenant, f"{self._select} AND p.{self._id} = ANY(%(ids)s)", {"ids": [*ids]})

    async def listed(
        self, connection: Connection, tenant: str, conditions: Sequence[Condition], order: str, limit: int
    ) -> Sequence[Found]:
        """The first rows of a tenant that meet all conditions, in an open transaction."""
        return await self._found(connection, tenant, *self.listed_query(conditions, order, limit))

    def listed_query(self, conditions: Sequence[Condition], order: str, limit: int) -> tuple[str, dict[str, Any]]:
        """The query for a whole list that is watched. Its order is the one in which an index gives the rows."""
        return self.page_query(order, {"watched": conditions}, None, limit)

    async def _found(self, connection: Connection, tenant: str, sql: str, values: Mapping[str, Any]) -> Sequence[Found]:
        await connection.execute("SELECT set_config('app.tenant', %s, true)", [tenant])
        cursor = await connection.execute(sql, {"tenant": tenant, **values})
        found = []
        for row in await cursor.fetchall():
            message = self._shown(row)
            digest = int(digest_of(message), 16)
            found.append(Found(getattr(message, self._id), self._row(*row[:-1]), message, digest))
        return found

    async def list(self, request: Any, context: Any) -> Any:
        """The answer of the List RPC: a page of the tenant's rows that pass all filters."""
        mask = mask_of(request, self._kind)
        found, bound = conditions_of(self._summary.filters, request.filter)
        order_by = self._order(request.order_by, found)
        column, descending = self._orders[order_by]
        size = request.page_size or pages.SIZE_DEFAULT
        query = (self._list_name, tenant(), column, str(descending), *bound)
        after = self._after(query, request.page_token, column)
        await self.gate.wait(request.consistency_token, tenant(), context.time_remaining())
        sql, values = self.page_query(order_by, found, after, size + 1)
        rows = await in_tenant(self.reads, tenant(), sql, values)
        cut, following = pages.cut(rows, size, query, lambda row: self._keys(row, column))
        answer = self._listed(next_page_token=following)
        shown = getattr(answer, self._many)
        for row in cut:
            if mask is None:
                self._fill(shown.add(), row)
            else:
                shown.append(only(mask, self._shown(row)))
        if any(row[-1] for row in cut):
            tell_stale(context)
        return answer

    def _order(self, asked: str, found: Mapping[str, Sequence[Condition]]) -> str:
        summary = self._summary
        return order_of(asked, found, orders=list(summary.orders), only_in=summary.only_in, apart=summary.apart)

    def page_query(
        self, order_by: str, found: Mapping[str, Sequence[Condition]], after: Any, limit: int
    ) -> tuple[str, dict[str, Any]]:
        """The query for a page, and its values without the tenant's. `after` has the sort keys of the last row before it."""
        column, descending = self._orders[order_by]
        direction, beyond = ("DESC", "<") if descending else ("ASC", ">")
        values: dict[str, Any] = {"limit": limit}
        if after is not None:
            found = needed_behind(found, column, after[0], descending=descending)
        branches = branches_of(self._select_page, found, values)
        ordered = f" ORDER BY p.{column} {direction}, p.{self._id} {direction} LIMIT %(limit)s"
        if after is not None:
            ordered = f" AND (p.{column}, p.{self._id}) {beyond} (%(after)s, %(after_id)s)" + ordered
            values |= {"after": after[0], "after_id": after[1]}
        parts = [sql + ordered for sql in branches]
        if len(parts) == 1:
            return parts[0], values
        # Each part reads its own index in order, and no more than a page of it.
        merged = " UNION ALL ".join(f"({part})" for part in parts)
        return f"SELECT * FROM ({merged}) AS p ORDER BY p.{column} {direction}, p.{self._id} {direction} LIMIT %(limit)s", values  # noqa: S608

    def _keys(self, values: tuple[Any, ...], column: str) -> tuple[str | int, str]:
        row = self._row(*values[:-1])
        return _sortable(row, column), getattr(row, self._id)

    def _after(self, query: tuple[str, ...], token: str, column: str) -> Any:
        """The sort keys that a page token holds. Times travel as whole microseconds."""
        kind = self._kinds[column]
        keys = pages.decode(query, token, (int if kind is datetime else kind, str))
        if keys is not None and kind is datetime:
            try:
                keys[0] = datetime.fromtimestamp(keys[0] // 1_000_000, UTC).replace(microsecond=keys[0] % 1_000_000)
            except (ValueError, OverflowError, OSError):  # beyond the calendar: not one of ours
                raise pages.invalid("is not a page token") from None
        return keys


def tell_stale(context: Any) -> None:
    """Says in the call's trailers that a row of the answer is older than the checkpoint: its events are parked."""
    context.set_trailing_metadata((STALE_TRAILER,))


async def in_tenant(reads: Reads, tenant: str, query: str, values: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """The rows of a query, as that tenant sees them. One round trip. Raises Unavailable."""
    named = {"tenant": tenant}
    async with reads.connection() as connection:
        return await rows_of_last(connection, (_AS_TENANT, named), (query, {**named, **values}))


def tenant() -> str:
    """The tenant of the caller."""
    return current_call.get().identity.tenant


def _sortable(row: Any, column: str) -> str | int:
    """What a row is sorted by, as a page token holds it."""
    value: str | int | datetime = getattr(row, column)
    if isinstance(value, datetime):
        return int(value.replace(microsecond=0).timestamp()) * 1_000_000 + value.microsecond
    return value


def _made(answer: Descriptor) -> type[Any]:
    return message_factory.GetMessageClass(answer)

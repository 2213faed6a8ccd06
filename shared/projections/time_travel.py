"""Summaries as they were, and why they are as they are: the events of a row folded again, in memory, by the same folds.

Nothing of it concerns the tables: the answer is what the projector would have in them at that place of the line, if it applied
these folds. A fold that raises parks the row here as it does there: the row stays as it was before, and is stale. Only that the
database would refuse a row is not noticed here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, suppress
from itertools import chain
from typing import Any, Generic

import orjson
from google.protobuf import json_format
from msgspec import Struct

from foldline.v1 import as_of_pb2, history_pb2
from foldline.v1.event_store_pb2 import EventEnvelope
from shared.folds.projection import Group
from shared.folds.summary import AggregateName, Summary
from shared.folds.table import Row
from shared.line.ends import AGGREGATE_PURGED
from shared.platform.fairness import Room
from shared.platform.identity import current_call, seen_position
from shared.projections.parking import Parking, aggregate_of, cause_of
from shared.projections.past_events import PastEvents, PastPage
from shared.projections.tables import Tables


class Past(Struct, Generic[Row], frozen=True):
    """A row as it was, and the event behind which it was so; `stale` if an event before that could not be applied."""

    row: Row | None
    origin: as_of_pb2.RowOrigin
    stale: bool


class Change(Struct, frozen=True):
    """What an event made of a row. `nth` counts the changes of the row from 1."""

    nth: int
    epoch: str
    envelope: EventEnvelope
    before: Any
    after: Any


class Explained(Struct, frozen=True):
    """Changes of a row with their numbers, the newest first; `stale` if an event behind them could not be applied.

    `there`: whether there ever was such a row.
    """

    changes: Sequence[tuple[int, as_of_pb2.RowChange]]
    stale: bool
    there: bool


class _Enough(Exception):
    """The changes that are wanted have been found."""


class Folded(Generic[Row]):
    """The rows of one id in the tables of a group, folded event by event."""

    def __init__(self, tables: Tables, summary: Summary[Row], id_: str) -> None:
        self._tables = tables
        self._make = summary.source.of_tables
        self._id = id_
        self._parking = Parking({})
        projections = tables.group.projections
        self._append_only = [projection.append_only for projection in projections]
        self._rows: list[dict[tuple[Any, ...], Any]] = [{} for _ in projections]
        self.row: Row | None = None

    @property
    def stale(self) -> bool:
        """Whether an event of the row could not be applied, so that it and later ones wait."""
        return any((key[1] if table else key[2]) == self._id for table, key in self._parking.new)

    def add(self, envelope: EventEnvelope) -> bool:
        """Applies the next event; returns whether the summary's row is another by it."""
        if envelope.type == AGGREGATE_PURGED:
            return self._purge(envelope)
        try:
            found = self._tables.items_of(envelope)
        except Exception as error:  # noqa: BLE001 - it parks its aggregate
            self._parking.fail(envelope, aggregate_of(envelope), cause_of(envelope, error))
            return False
        applied = False
        for at, key, fold in found[1] if found else ():
            place = self._tables.name_of(at), key
            if key[1] != self._id or (self._parking.active and self._parking.holds(envelope, place)):
                continue
            try:
                made = fold(self._rows[at].get(key), found[0], envelope)  # type: ignore[index]
            except Exception as error:  # noqa: BLE001 - it parks its key
                self._parking.fail(envelope, place, cause_of(envelope, error))
                continue
            if self._append_only[at]:
                continue  # no fold reads it again
            applied = True
            if made is None:
                self._rows[at].pop(key, None)
            else:
                self._rows[at][key] = made
        return applied and self._is_another()

    def _purge(self, envelope: EventEnvelope) -> bool:
        """The rows without an aggregate that is purged, of whose events some may still be there; whether the row is another."""
        for rows, projection in zip(self._rows, self._tables.group.projections, strict=True):
            for purge in projection.purges:
                if purge.category != envelope.aggregate_type:
                    continue
                for key, row in [*rows.items()]:
                    if getattr(row, purge.column) != envelope.aggregate_id:
                        continue
                    if purge.fold is None:
                        del rows[key]
                    else:
                        rows[key] = purge.fold(row)
        return self._is_another()

    def _is_another(self) -> bool:
        """Makes the summary's row of the tables' rows; returns whether it is another."""
        before, self.row = self.row, self._make(dict(self._tables_now()))
        return self.row != before

    def _tables_now(self) -> Iterator[tuple[str, Sequence[Any]]]:
        for at, rows in enumerate(self._rows):
            yield self._tables.name_of(at), [rows[key] for key in sorted(rows)] if len(rows) > 1 else [*rows.values()]


class TimeTravel(Generic[Row]):
    """The rows of one summary as of any time, and their changes."""

    def __init__(self, summary: Summary[Row], group: Group, events: PastEvents, room: Room) -> None:
        """`room` is shared by all summaries of an instance."""
        self._summary = summary
        self._history = summary.history
        self._ends = {kind.DESCRIPTOR.full_name for kind in summary.history.ends}
        self._names = {kind.DESCRIPTOR.full_name: (kind, of) for kind, of in summary.history.names.items()}
        self._tables = Tables(group)
        self._events = events
        self._room = room

    async def as_of(self, id_: str, as_of: as_of_pb2.AsOf, context: Any) -> Past[Row]:
        """The row of an id in the caller's tenant. Raises as PastEvents.read does, and OverLimit (TOO_MANY_PAST_STATES)."""
        last: deque[Change] = deque(maxlen=1)
        folded = await self._fold(id_, as_of, context, last.append)
        return Past(folded.row, self._origin(last[0]) if last else as_of_pb2.RowOrigin(), folded.stale)

    async def explain(
        self, id_: str, as_of: as_of_pb2.AsOf | None, context: Any, *, field: str, before: int | None, limit: int
    ) -> Explained:
        """The last `limit` changes of a row, or those before its change number `before`, the newest first.

        With a `field` these are the changes of that field.

        Raises as `as_of` does.
        """
        found: deque[Change] = deque(maxlen=limit)
        there = False

        def note(change: Change) -> None:
            nonlocal there
            there = True
            if before is not None and change.nth >= before:
                raise _Enough
            if not field or self._differ(change, field):
                found.append(change)

        stale = False
        with suppress(_Enough):
            stale = (await self._fold(id_, as_of, context, note)).stale
        return Explained([(change.nth, self._row_change(change, field)) for change in reversed(found)], stale, there)

    def fields(self) -> list[str]:
        """The names of the fields whose changes can be explained."""
        return [name for name in self._summary.message.DESCRIPTOR.fields_by_name if name != "stale"]

    def _differ(self, change: Change, field: str) -> list[history_pb2.FieldChange]:
        """The fields of the summary that an event changed; of one field alone if its name is given."""
        one, other = self._shown(change.before), self._shown(change.after)
        return [
            history_pb2.FieldChange(field=name, from_json=one.get(name, ""), to_json=other.get(name, ""))
            for name in ([field] if field else self.fields())
            if one.get(name) != other.get(name)
        ]

    def _shown(self, row: Any) -> dict[str, str]:
        """Each field of the summary of a row as JSON, those that are not set left out."""
        if row is None:
            return {}
        fields = json_format.MessageToDict(
            self._summary.view(row), preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        return {name: orjson.dumps(value).decode() for name, value in fields.items()}

    def _row_change(self, change: Change, field: str) -> as_of_pb2.RowChange:
        envelope, by = change.envelope, change.envelope.metadata
        return as_of_pb2.RowChange(
            origin=self._origin(change),
            event_id=envelope.event_id,
            type=envelope.type,
            aggregate_type=envelope.aggregate_type,
            aggregate_id=envelope.aggregate_id,
            version=envelope.version,
            command_id=by.command_id,
            correlation_id=by.correlation_id,
            causation_id=by.causation_id,
            user_id=by.user_id,
            on_behalf_of=by.on_behalf_of,
            fields=self._differ(change, field),
        )

    def _origin(self, change: Change) -> as_of_pb2.RowOrigin:
        envelope = change.envelope
        return as_of_pb2.RowOrigin(
            token=self._events.token(change.epoch, envelope.position),
            recorded_at=envelope.recorded_at,
            position=seen_position(envelope.position),
        )

    async def _fold(self, id_: str, as_of: as_of_pb2.AsOf | None, context: Any, changed: Callable[[Change], None]) -> Folded[Row]:
        """Folds the events of an id, and tells `changed` of each change."""
        folded, nth = Folded(self._tables, self._summary, id_), 0
        tenant = current_call.get().identity.tenant
        async with self._room.readings.one(tenant), aclosing(self._needed(id_, as_of, context)) as pages:
            async for page in pages:
                async with self._room.slots.one(tenant):
                    await self._room.turns.next(tenant)
                    for envelope in page.events:
                        before = folded.row
                        if folded.add(envelope):
                            nth += 1
                            changed(Change(nth, page.epoch, envelope, before, folded.row))
        return folded

    async def _needed(self, id_: str, as_of: as_of_pb2.AsOf | None, context: Any) -> AsyncGenerator[PastPage, None]:
        """The events that the history of a summary names, in the order of the line."""
        own = (self._history.category, id_)
        if not self._names:
            async with aclosing(self._events.read([own], context, as_of=as_of)) as pages:
                async for page in pages:
                    yield page
            return
        # The whole stream of its own: an event at `as_of` may be of an aggregate that is named only behind it.
        begun, names = "", {own: None}
        async with aclosing(self._events.read([own], context)) as pages:
            async for page in pages:
                if not begun:
                    begun = self._events.token(page.epoch, page.events[0].position - 1)
                names.update(dict.fromkeys(chain.from_iterable(map(self._named, page.events))))
        async with aclosing(self._events.read([*names], context, after=begun, as_of=as_of)) as pages:
            async for page in pages:
                last = next((nth for nth, envelope in enumerate(page.events, 1) if self._is_end(envelope, own)), None)
                yield page if last is None else PastPage(page.epoch, page.events[:last])
                if last is not None:
                    return

    def _is_end(self, envelope: EventEnvelope, own: AggregateName) -> bool:
        return envelope.type in self._ends and (envelope.aggregate_type, envelope.aggregate_id) == own

    def _named(self, envelope: EventEnvelope) -> Sequence[AggregateName]:
        """The aggregates that an event names; of one that cannot be read none, which parks the row when it is folded."""
        if (found := self._names.get(envelope.type)) is None:
            return ()
        kind, named = found
        try:
            return [*named(kind.FromString(envelope.payload))]
        except Exception:  # noqa: BLE001
            return ()

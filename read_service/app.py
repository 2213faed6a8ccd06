"""Builds the read service: constructor arguments only. Tests call the same `build`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field, model_validator

from bank.v1.totals_query_pb2_grpc import add_TotalsQueryServiceServicer_to_server
from foldline.v1.projection_pb2_grpc import add_ProjectionServiceServicer_to_server
from read_service.api import ROLES, WATCH_REBUILD, AccountQueryService, ProjectionService
from read_service.projections.accounts import ACCOUNT
from read_service.registry import GROUPS, RPCS
from read_service.totals import COUNTED, TotalsQueryService
from read_service.totals import ROLES as TOTALS_ROLES
from shared.folds.projection import Group
from shared.line import checkpoint
from shared.line.consistency import ConsistencyGate, Reached
from shared.line.consumer_metrics import watch_consumers
from shared.platform.fairness import Room
from shared.platform.leader import LockClass
from shared.platform.peers import PerhapsWriteServicePeer
from shared.platform.postgres import Reads
from shared.platform.seal import Seal, SealKeys
from shared.platform.settings import ServerSettings, refuse_larger
from shared.platform.urls import DatabaseUrl
from shared.projections.admin import watch_parked
from shared.projections.past_events import PastEvents
from shared.projections.summary import SummaryServicer
from shared.projections.summary_rpcs import SummaryRpcs, groups_of, roles_of, watch_limits
from shared.projections.watch import WatchLimits
from shared.rpc.client import channel
from shared.rpc.probes import Probes
from shared.rpc.server import Server
from upcasters import UPCASTERS

TABLES = (
    *(projection.table.name for group in GROUPS for projection in group.projections),
    "checkpoints",
    "parked_keys",
)
SERVICERS: dict[str, type[SummaryServicer[Any]]] = {ACCOUNT.name: AccountQueryService}
"""The services that have more RPCs than their summary's, by the summary's name."""


class ReadSettings(PerhapsWriteServicePeer, ServerSettings):
    """The read service: answers queries."""

    query_database_url: DatabaseUrl
    """The read database's URL, as the query role, which sees one tenant's rows at a time; it may lead through a pooler."""
    seal_keys: SealKeys
    """The keys that seal consistency and resume tokens, the same for write and read services: 64 hexadecimal digits each,
    separated by commas. The first seals, all open, so a key is changed by adding the new one behind, then in front."""
    shard: int = Field(1, ge=1)
    """The shard whose tables are read."""
    connections_max: int = Field(8, ge=1)
    """The largest number of pooled connections."""
    watches_max: int = Field(1500, ge=1)
    """How many watches this instance serves at once; keep it below FOLDLINE_CALLS_AT_ONCE_MAX."""
    watches_per_tenant_max: int = Field(500, ge=1)
    """How many of them may be of one tenant."""
    watched_lists_max: int = Field(150, ge=1)
    """How many lists are watched at once at this instance, each by any number of watches; each takes up to 200 KB."""
    watched_lists_per_tenant_max: int = Field(50, ge=1)
    """How many of them may be of one tenant."""
    history_events_max: int = Field(10_000, ge=1, le=100_000)
    """From how many events a summary of the past is folded at the most."""
    watch_s_max: float = Field(3600, gt=0)
    """The longest that a watch may last, in seconds; its caller then goes on with the resume token."""

    @model_validator(mode="after")
    def _watches_leave_room(self) -> ReadSettings:
        refuse_larger(self, watches_per_tenant_max="watches_max", watched_lists_per_tenant_max="watched_lists_max")
        if self.watches_max >= self.calls_at_once_max:
            raise ValueError(
                "FOLDLINE_WATCHES_MAX must be smaller than FOLDLINE_CALLS_AT_ONCE_MAX, or watches leave no other calls room"
            )
        return self


def build(settings: ReadSettings, reads: Reads, rows: Sequence[SummaryRpcs[Any]] = RPCS) -> Server:
    """The server with its services, which show the summaries of `rows`.

    `reads` is opened and closed by the caller, the latter when the server is drained.
    """

    def gate_of(group: Group) -> ConsistencyGate:
        async def progress() -> Reached:
            async with reads.connection() as connection:
                return await checkpoint.read_serving(connection, group.name, settings.shard)

        return ConsistencyGate(settings.shard, progress, seal, wait_max_s=settings.deadline_default_s)

    seal = Seal(settings.seal_keys.get_secret_value())
    groups = groups_of(rows)
    gates = {name: gate_of(group) for name, group in groups.items()}
    server = Server(
        settings,
        roles={**ROLES, **TOTALS_ROLES, **roles_of(rows)},
        deadlines_max={**watch_limits(rows, settings.watch_s_max), WATCH_REBUILD: settings.watch_s_max},
        probes=Probes(settings, "read_service"),
    )
    probe = server.probes.needs_database(settings.query_database_url.get_secret_value())
    watch_consumers(server.probes.metrics, probe, LockClass.PROJECTOR, settings.shard, gates)
    watch_parked(server.probes.metrics, probe, settings.shard, gates)
    limits = WatchLimits(settings.watches_per_tenant_max, settings.watches_max)
    lists = WatchLimits(settings.watched_lists_per_tenant_max, settings.watched_lists_max, "watched lists")
    past = None
    if settings.write_address:
        # Questions change nothing, so one that is UNAVAILABLE is asked again.
        to_write = channel(settings.write_address, tls=settings.write_tls)
        server.on_drained(to_write.close)
        past = PastEvents(to_write, seal, settings.shard, settings.history_events_max, UPCASTERS), Room()
    for row in rows:
        made = SERVICERS.get(row.summary.name, SummaryServicer)
        servicer = made(row, reads, gates[row.group.name], settings.shard, limits, lists, past)
        server.add(row.add_to_server, servicer)
        server.on_draining(servicer.watches.end)
    counted = [gates[name] for name, group in groups.items() if COUNTED.intersection(it.table.name for it in group.projections)]
    server.add(add_TotalsQueryServiceServicer_to_server, TotalsQueryService(reads, *counted))
    server.add(add_ProjectionServiceServicer_to_server, ProjectionService(reads, settings.shard, tuple(gates)))
    return server

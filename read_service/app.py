"""Builds the read service: constructor arguments only. Tests call the same `build`."""

from __future__ import annotations

from typing import Any

from pydantic import Field, SecretStr

from foldline.v1.projection_pb2_grpc import add_ProjectionServiceServicer_to_server
from read_service.api import ROLES, AccountQueryService, ProjectionService
from read_service.projections.accounts import ACCOUNT
from read_service.registry import GROUPS, RPCS
from shared.folds.projection import Group
from shared.line import checkpoint
from shared.line.consistency import ConsistencyGate, Reached
from shared.platform.postgres import Reads
from shared.platform.settings import ServerSettings
from shared.projections.summary import SummaryServicer, roles_of
from shared.rpc.probes import Probes
from shared.rpc.server import Server

TABLES = (
    *(projection.table.name for group in GROUPS for projection in group.projections),
    "checkpoints",
    "parked_keys",
)
SERVICERS: dict[str, type[SummaryServicer[Any]]] = {ACCOUNT.name: AccountQueryService}
"""The services that have more RPCs than their summary's, by the summary's name."""


class ReadSettings(ServerSettings):
    """The read service: answers queries."""

    query_database_url: SecretStr
    """The read database's URL, as the query role, which sees one tenant's rows at a time."""
    shard: int = Field(1, ge=1)
    """The shard whose tables are read."""
    connections_max: int = Field(8, ge=1)
    """The largest number of pooled connections."""


def build(settings: ReadSettings, reads: Reads) -> Server:
    """The server with its services; `reads` is opened and closed by the caller, the latter when the server is drained."""

    def gate_of(group: Group) -> ConsistencyGate:
        async def progress() -> Reached:
            async with reads.connection() as connection:
                return await checkpoint.read_serving(connection, group.name, settings.shard)

        return ConsistencyGate(settings.shard, progress, wait_max_s=settings.deadline_default_s)

    gates = {group.name: gate_of(group) for group in GROUPS}
    server = Server(settings, roles={**ROLES, **roles_of(RPCS)}, probes=Probes(settings, "read_service"))
    server.probes.needs_database(settings.query_database_url.get_secret_value())
    for row in RPCS:
        server.add(row.add_to_server, SERVICERS.get(row.summary.name, SummaryServicer)(row, reads, gates[row.group.name]))
    server.add(add_ProjectionServiceServicer_to_server, ProjectionService(reads, settings.shard, tuple(gates)))
    return server

"""Builds the read service: constructor arguments only. Tests call the same `build`."""

from __future__ import annotations

from pydantic import Field, SecretStr

from bank.v1.account_query_pb2_grpc import add_AccountQueryServiceServicer_to_server
from bank.v1.person_query_pb2_grpc import add_PersonQueryServiceServicer_to_server
from bank.v1.transfer_query_pb2_grpc import add_TransferQueryServiceServicer_to_server
from bank.v1.user_query_pb2_grpc import add_UserQueryServiceServicer_to_server
from foldline.v1.projection_pb2_grpc import add_ProjectionServiceServicer_to_server
from read_service.api import (
    ROLES,
    AccountQueryService,
    PersonQueryService,
    ProjectionService,
    TransferQueryService,
    UserQueryService,
)
from read_service.projections.accounts import accounts, movements
from read_service.projections.people import people, person_totals
from read_service.projections.transfers import transfers
from read_service.projections.users import users
from read_service.registry import SUMMARIES
from shared.line import checkpoint
from shared.line.consistency import ConsistencyGate, Reached
from shared.platform.postgres import Reads
from shared.platform.settings import ServerSettings
from shared.rpc.probes import Probes
from shared.rpc.server import Server

TABLES = (people.name, person_totals.name, accounts.name, movements.name, transfers.name, users.name, "checkpoints")


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

    async def progress() -> Reached:
        async with reads.connection() as connection:
            return await checkpoint.read_reached(connection, SUMMARIES.name, settings.shard)

    gate = ConsistencyGate(settings.shard, progress, wait_max_s=settings.deadline_default_s)
    server = Server(settings, roles=ROLES, probes=Probes(settings, "read_service"))
    server.probes.needs_database(settings.query_database_url.get_secret_value())
    server.add(add_PersonQueryServiceServicer_to_server, PersonQueryService(reads, gate))
    server.add(add_AccountQueryServiceServicer_to_server, AccountQueryService(reads, gate))
    server.add(add_TransferQueryServiceServicer_to_server, TransferQueryService(reads, gate))
    server.add(add_UserQueryServiceServicer_to_server, UserQueryService(reads, gate))
    server.add(add_ProjectionServiceServicer_to_server, ProjectionService(reads, settings.shard, (SUMMARIES.name,)))
    return server

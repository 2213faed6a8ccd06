"""The receipts of a write service that has just started, over real gRPC and PostgreSQL."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

from bank.v1 import user_pb2_grpc
from deploy.bank_requests import start_registration
from deploy.bootstrap import Database
from foldline.v1 import command_pb2, command_pb2_grpc
from shared.line.consistency import decode
from shared.platform.identity import Role
from shared.platform.seal import Seal
from shared.platform.tokens import DevelopmentIssuer
from shared.rpc.client import bearer
from tests.support.checks.history import head_of
from tests.support.system.sealing import KEYS
from tests.support.system.write_server import write_server

TENANT = "acme"


async def test_receipts_from_the_log_name_the_history_before_the_first_commit(write_db: Database, tmp_path: Path) -> None:
    """Of a command that is looked up, and of a repeat that is answered from the log: else no query would take their tokens."""
    issuer = DevelopmentIssuer(tmp_path)
    who = bearer(issuer.issue(tenant=TENANT, user_id="anna", roles=[Role.USER, Role.TENANT_ADMIN]))
    asked = start_registration(str(uuid4()), "anna", "a long enough secret")
    async with write_server(write_db, issuer) as to_it:
        first = await user_pb2_grpc.UserServiceStub(to_it).StartUserRegistration(asked, metadata=who, timeout=60)
    wanted = command_pb2.GetCommandRequest(command_id=first.command_id)
    async with write_server(write_db, issuer) as to_it:
        found = await command_pb2_grpc.CommandServiceStub(to_it).GetCommand(wanted, metadata=who, timeout=60)
        again = await user_pb2_grpc.UserServiceStub(to_it).StartUserRegistration(asked, metadata=who, timeout=60)
    head = await head_of(write_db)
    for receipt in (first, found.command.receipt, again):
        assert decode(receipt.consistency_token, Seal(KEYS), TENANT).epoch == head.epoch

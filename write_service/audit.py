"""The RPC that shows who did what. ROLES says which roles may call it."""

from __future__ import annotations

from typing import Any

from foldline.v1 import audit_pb2, audit_pb2_grpc
from shared.commands.audit import list_audit
from shared.commands.bus import CommandBus
from shared.commands.registry import CommandRegistry
from shared.platform.identity import Role, current_call
from shared.platform.postgres import Reads

ROLES: dict[str, frozenset[Role]] = {"foldline.v1.AuditService/ListAudit": frozenset({Role.TENANT_ADMIN, Role.OPERATOR})}


class AuditService(audit_pb2_grpc.AuditServiceServicer):
    """foldline.v1.AuditService."""

    def __init__(self, commands: CommandBus, reads: Reads, registry: CommandRegistry) -> None:
        self._commands = commands
        self._reads = reads
        self._registry = registry

    async def ListAudit(self, request: audit_pb2.ListAuditRequest, context: Any) -> audit_pb2.ListAuditResponse:
        return await list_audit(current_call.get().identity, request, self._commands, self._registry, self._reads)

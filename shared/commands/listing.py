"""The command log for its readers: which commands a caller may list, page by page."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from foldline.v1 import command_pb2
from shared.commands.bus import STATUSES, CommandBus
from shared.commands.log import StoredCommand, Wanted, count_commands, list_commands
from shared.commands.registry import CommandRegistry
from shared.folds.errors import Forbidden
from shared.platform.identity import Identity, Role
from shared.platform.postgres import Reads
from shared.rpc import pages
from shared.rpc.bounds import rules_broken
from shared.rpc.validation import moment_of

COUNTED_MAX = 1000

_STATUSES = {number: name for name, number in STATUSES.items()}


async def list_for(
    identity: Identity,
    request: command_pb2.ListCommandsRequest,
    commands: CommandBus,
    registry: CommandRegistry,
    reads: Reads,
) -> command_pb2.ListCommandsResponse:
    """The page that was asked for. Raises Forbidden (ROLE_MISSING) or Invalid (INVALID_REQUEST, PAGE_TOKEN_INVALID)."""
    wanted = _wanted(identity, request.filter, registry.hidden_from(identity.roles))
    size = request.page_size or pages.SIZE_DEFAULT
    query = ("ListCommands", identity.user_id, *map(str, (getattr(wanted, name) for name in wanted.__struct_fields__)))
    keys = pages.decode(query, request.page_token, (int, str))
    after = (pages.moment_of(keys[0]), pages.uuid_of(keys[1])) if keys else None
    async with reads.connection() as connection:
        rows = await list_commands(connection, wanted, limit=size + 1, after=after)
        count = await count_commands(connection, wanted, limit=COUNTED_MAX) if request.counted else 0
    shown, following = pages.cut(rows, size, query, _place)
    return command_pb2.ListCommandsResponse(
        commands=[commands.record(row) for row in shown], next_page_token=following, count=count
    )


def _wanted(identity: Identity, given: command_pb2.CommandFilter, hidden: list[str]) -> Wanted:
    """What the caller may ask for: a user for commands of the user's own, an operator for those of any tenant."""
    roles, user_id = identity.roles, given.user_id
    if given.tenant not in ("", identity.tenant) and Role.OPERATOR not in roles:
        raise Forbidden("ROLE_MISSING", "only an operator may list another tenant's commands", roles=Role.OPERATOR)
    if roles.isdisjoint((Role.TENANT_ADMIN, Role.OPERATOR)) and given.on_behalf_of != identity.user_id:
        if user_id not in ("", identity.user_id):
            raise Forbidden("ROLE_MISSING", "only a tenant administrator may list others' commands", roles=Role.TENANT_ADMIN)
        user_id = identity.user_id
    if given.aggregate_id and not given.aggregate_type:
        raise rules_broken(("filter.aggregate_type", "is needed with aggregate_id"))
    return Wanted(
        tenant=given.tenant or identity.tenant,
        hidden=hidden,
        status=_STATUSES.get(given.status, ""),
        type=given.type,
        category=given.aggregate_type,
        aggregate_id=given.aggregate_id.lower(),
        user_id=user_id,
        on_behalf_of=given.on_behalf_of,
        correlation_id=given.correlation_id.lower(),
        causation_id=given.causation_id.lower(),
        received_from=_moment(given, "received_from"),
        received_before=_moment(given, "received_before"),
    )


def _moment(given: Any, field: str) -> datetime | None:
    return moment_of(getattr(given, field), f"filter.{field}") if given.HasField(field) else None


def _place(row: StoredCommand) -> tuple[int, str]:
    return pages.moment_key(row.received_at), row.command_id

"""The query RPCs: each waits for the caller's consistency token, asks one query, and answers.

ROLES says who may call what; the tenant is always that of the caller's token.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from typing import Any

from bank.v1 import (
    account_query_pb2,
    account_query_pb2_grpc,
    person_query_pb2,
    person_query_pb2_grpc,
    transfer_pb2,
    transfer_query_pb2,
    transfer_query_pb2_grpc,
    user_query_pb2,
    user_query_pb2_grpc,
)
from foldline.v1 import projection_pb2, projection_pb2_grpc
from read_service import queries
from read_service.projections import transfers, users
from read_service.projections.accounts import ACTIVE, CLOSED, FROZEN
from read_service.projections.people import fold_name
from read_service.queries import Order
from shared.folds.errors import NotFound, Rejected
from shared.line.consistency import ConsistencyGate
from shared.line.standing import Standing, State, read_standings
from shared.platform.clock import timestamp
from shared.platform.identity import Role, current_call
from shared.platform.leader import LockClass
from shared.platform.postgres import Reads, one
from shared.platform.telemetry import logger
from shared.rpc import pages

CALLERS = frozenset({Role.USER, Role.TENANT_ADMIN, Role.OPERATOR})
ADMINISTRATORS = frozenset({Role.TENANT_ADMIN, Role.OPERATOR})
OPERATORS = frozenset({Role.OPERATOR})

log = logger(__name__)

ROLES: Mapping[str, frozenset[Role]] = {
    "bank.v1.PersonQueryService/GetPerson": CALLERS,
    "bank.v1.PersonQueryService/ListPersons": CALLERS,
    "bank.v1.AccountQueryService/GetAccount": CALLERS,
    "bank.v1.AccountQueryService/ListAccounts": CALLERS,
    "bank.v1.AccountQueryService/ListMovements": CALLERS,
    "bank.v1.TransferQueryService/GetTransfer": CALLERS,
    "bank.v1.TransferQueryService/ListTransfers": CALLERS,
    "bank.v1.UserQueryService/GetUser": ADMINISTRATORS,
    "bank.v1.UserQueryService/ListUsers": ADMINISTRATORS,
    "foldline.v1.ProjectionService/ListProjections": OPERATORS,
    "foldline.v1.ProjectionService/RefillProjection": OPERATORS,
}

PERSON_ORDERS = {
    "": Order("name_folded"),
    "name": Order("name_folded"),
    "name desc": Order("name_folded", descending=True),
    "registered_at": Order("registered_at"),
    "registered_at desc": Order("registered_at", descending=True),
}
ACCOUNT_ORDERS = {
    "": Order("opened_at"),
    "opened_at": Order("opened_at"),
    "opened_at desc": Order("opened_at", descending=True),
    "balance_minor": Order("balance_minor"),
    "balance_minor desc": Order("balance_minor", descending=True),
}
STATUSES = {
    account_query_pb2.ACCOUNT_STATUS_ACTIVE: ACTIVE,
    account_query_pb2.ACCOUNT_STATUS_FROZEN: FROZEN,
    account_query_pb2.ACCOUNT_STATUS_CLOSED: CLOSED,
}
START_ORDERS = {
    "": Order("started_at"),
    "started_at": Order("started_at"),
    "started_at desc": Order("started_at", descending=True),
}
TRANSFER_STATUSES = {
    transfer_query_pb2.TRANSFER_STATUS_STARTED: transfers.STARTED,
    transfer_query_pb2.TRANSFER_STATUS_COMPLETED: transfers.COMPLETED,
    transfer_query_pb2.TRANSFER_STATUS_FAILED: transfers.FAILED,
}
TRANSFER_STATUS_OF = {text: status for status, text in TRANSFER_STATUSES.items()}
REGISTRATION_STATUSES = {
    user_query_pb2.REGISTRATION_STATUS_STARTED: users.STARTED,
    user_query_pb2.REGISTRATION_STATUS_SUCCEEDED: users.SUCCEEDED,
    user_query_pb2.REGISTRATION_STATUS_FAILED: users.FAILED,
}
REGISTRATION_STATUS_OF = {text: status for status, text in REGISTRATION_STATUSES.items()}
STATUS_OF = {text: status for status, text in STATUSES.items()}
STATES = {
    State.RUNNING: projection_pb2.PROJECTION_STATE_RUNNING,
    State.STOPPED: projection_pb2.PROJECTION_STATE_STOPPED,
    State.DIVERGED: projection_pb2.PROJECTION_STATE_DIVERGED,
    State.AWAY: projection_pb2.PROJECTION_STATE_AWAY,
}


class PersonQueryService(person_query_pb2_grpc.PersonQueryServiceServicer):
    """bank.v1.PersonQueryService."""

    def __init__(self, reads: Reads, gate: ConsistencyGate) -> None:
        self._reads = reads
        self._gate = gate

    async def GetPerson(self, request: person_query_pb2.GetPersonRequest, context: Any) -> person_query_pb2.GetPersonResponse:
        await self._gate.wait(request.consistency_token, context.time_remaining())
        person_id = request.person_id.lower()
        person = await queries.get_person(self._reads, _tenant(), person_id)
        if person is None:
            raise NotFound("PERSON_NOT_FOUND", f"there is no person {person_id}")
        return person_query_pb2.GetPersonResponse(person=_person(person))

    async def ListPersons(
        self, request: person_query_pb2.ListPersonsRequest, context: Any
    ) -> person_query_pb2.ListPersonsResponse:
        tenant, prefix = _tenant(), fold_name(request.filter.name_prefix)
        order, size = PERSON_ORDERS[request.order_by], request.page_size or pages.SIZE_DEFAULT
        query = ("ListPersons", tenant, order.column, str(order.descending), prefix)
        after = _after(query, request.page_token, order)
        await self._gate.wait(request.consistency_token, context.time_remaining())
        rows = await queries.list_persons(self._reads, tenant, order, after, size + 1, folded_prefix=prefix)
        shown, following = pages.cut(rows, size, query, lambda row: (_sortable(row, order), row.person_id))
        return person_query_pb2.ListPersonsResponse(persons=[_person(person) for person in shown], next_page_token=following)


class AccountQueryService(account_query_pb2_grpc.AccountQueryServiceServicer):
    """bank.v1.AccountQueryService."""

    def __init__(self, reads: Reads, gate: ConsistencyGate) -> None:
        self._reads = reads
        self._gate = gate

    async def GetAccount(
        self, request: account_query_pb2.GetAccountRequest, context: Any
    ) -> account_query_pb2.GetAccountResponse:
        await self._gate.wait(request.consistency_token, context.time_remaining())
        account = await self._existing(request.account_id.lower())
        return account_query_pb2.GetAccountResponse(account=_account(account))

    async def ListAccounts(
        self, request: account_query_pb2.ListAccountsRequest, context: Any
    ) -> account_query_pb2.ListAccountsResponse:
        tenant, owner_id = _tenant(), request.filter.owner_id.lower()
        status, currency = STATUSES.get(request.filter.status, ""), request.filter.currency
        order, size = ACCOUNT_ORDERS[request.order_by], request.page_size or pages.SIZE_DEFAULT
        query = ("ListAccounts", tenant, order.column, str(order.descending), owner_id, status, currency)
        after = _after(query, request.page_token, order)
        await self._gate.wait(request.consistency_token, context.time_remaining())
        rows = await queries.list_accounts(
            self._reads, tenant, order, after, size + 1, owner_id=owner_id, status=status, currency=currency
        )
        shown, following = pages.cut(rows, size, query, lambda row: (_sortable(row, order), row.account_id))
        return account_query_pb2.ListAccountsResponse(
            accounts=[_account(account) for account in shown], next_page_token=following
        )

    async def ListMovements(
        self, request: account_query_pb2.ListMovementsRequest, context: Any
    ) -> account_query_pb2.ListMovementsResponse:
        tenant, account_id = _tenant(), request.account_id.lower()
        size = request.page_size or pages.SIZE_DEFAULT
        query = ("ListMovements", tenant, account_id)
        after = pages.decode(query, request.page_token, (int,))
        await self._gate.wait(request.consistency_token, context.time_remaining())
        rows = await queries.list_movements(self._reads, tenant, account_id, after[0] if after else None, size + 1)
        if not rows:
            await self._existing(account_id)
        shown, following = pages.cut(rows, size, query, lambda row: (row.version,))
        return account_query_pb2.ListMovementsResponse(
            movements=[_movement(movement) for movement in shown], next_page_token=following
        )

    async def _existing(self, account_id: str) -> queries.Account:
        account = await queries.get_account(self._reads, _tenant(), account_id)
        if account is None:
            raise NotFound("ACCOUNT_NOT_FOUND", f"there is no account {account_id}")
        return account


class TransferQueryService(transfer_query_pb2_grpc.TransferQueryServiceServicer):
    """bank.v1.TransferQueryService."""

    def __init__(self, reads: Reads, gate: ConsistencyGate) -> None:
        self._reads = reads
        self._gate = gate

    async def GetTransfer(
        self, request: transfer_query_pb2.GetTransferRequest, context: Any
    ) -> transfer_query_pb2.GetTransferResponse:
        await self._gate.wait(request.consistency_token, context.time_remaining())
        transfer_id = request.transfer_id.lower()
        transfer = await queries.get_transfer(self._reads, _tenant(), transfer_id)
        if transfer is None:
            raise NotFound("TRANSFER_NOT_FOUND", f"there is no transfer {transfer_id}")
        return transfer_query_pb2.GetTransferResponse(transfer=_transfer(transfer))

    async def ListTransfers(
        self, request: transfer_query_pb2.ListTransfersRequest, context: Any
    ) -> transfer_query_pb2.ListTransfersResponse:
        tenant, account_id = _tenant(), request.filter.account_id.lower()
        status = TRANSFER_STATUSES.get(request.filter.status, "")
        order, size = START_ORDERS[request.order_by], request.page_size or pages.SIZE_DEFAULT
        query = ("ListTransfers", tenant, str(order.descending), account_id, status)
        after = _after(query, request.page_token, order)
        await self._gate.wait(request.consistency_token, context.time_remaining())
        rows = await queries.list_transfers(self._reads, tenant, order, after, size + 1, account_id=account_id, status=status)
        shown, following = pages.cut(rows, size, query, lambda row: (_sortable(row, order), row.transfer_id))
        return transfer_query_pb2.ListTransfersResponse(
            transfers=[_transfer(transfer) for transfer in shown], next_page_token=following
        )


class UserQueryService(user_query_pb2_grpc.UserQueryServiceServicer):
    """bank.v1.UserQueryService."""

    def __init__(self, reads: Reads, gate: ConsistencyGate) -> None:
        self._reads = reads
        self._gate = gate

    async def GetUser(self, request: user_query_pb2.GetUserRequest, context: Any) -> user_query_pb2.GetUserResponse:
        await self._gate.wait(request.consistency_token, context.time_remaining())
        user_id = request.user_id.lower()
        user = await queries.get_user(self._reads, _tenant(), user_id)
        if user is None:
            raise NotFound("USER_NOT_FOUND", f"there is no user {user_id}")
        return user_query_pb2.GetUserResponse(user=_user(user))

    async def ListUsers(self, request: user_query_pb2.ListUsersRequest, context: Any) -> user_query_pb2.ListUsersResponse:
        tenant, status = _tenant(), REGISTRATION_STATUSES.get(request.filter.status, "")
        order, size = START_ORDERS[request.order_by], request.page_size or pages.SIZE_DEFAULT
        query = ("ListUsers", tenant, str(order.descending), status)
        after = _after(query, request.page_token, order)
        await self._gate.wait(request.consistency_token, context.time_remaining())
        rows = await queries.list_users(self._reads, tenant, order, after, size + 1, status=status)
        shown, following = pages.cut(rows, size, query, lambda row: (_sortable(row, order), row.user_id))
        return user_query_pb2.ListUsersResponse(users=[_user(user) for user in shown], next_page_token=following)


class ProjectionService(projection_pb2_grpc.ProjectionServiceServicer):
    """foldline.v1.ProjectionService."""

    def __init__(self, reads: Reads, shard: int, names: Collection[str]) -> None:
        """`names` are those of the groups of tables."""
        self._reads = reads
        self._shard = shard
        self._names = names

    async def ListProjections(
        self, request: projection_pb2.ListProjectionsRequest, context: Any
    ) -> projection_pb2.ListProjectionsResponse:
        async with self._reads.connection() as connection:
            found = await read_standings(connection, LockClass.PROJECTOR, self._shard, self._names)
        return projection_pb2.ListProjectionsResponse(projections=map(_projection, found))

    async def RefillProjection(
        self, request: projection_pb2.RefillProjectionRequest, context: Any
    ) -> projection_pb2.RefillProjectionResponse:
        if request.name not in self._names:
            raise NotFound("PROJECTION_NOT_FOUND", f"there is no projection {request.name}")
        async with self._reads.connection() as connection:
            [found] = await read_standings(connection, LockClass.PROJECTOR, self._shard, (request.name,))
            (asked,) = await one(connection, "SELECT ask_refill(%s, %s)", (request.name, self._shard))
        if not asked:
            raise Rejected("NOT_DIVERGED", "the projection follows the line, or stopped for another reason: see its state")
        log.warning("refill_asked", projection=request.name, user_id=current_call.get().identity.user_id)
        return projection_pb2.RefillProjectionResponse(projection=_projection(found))


def _tenant() -> str:
    return current_call.get().identity.tenant


def _after(query: tuple[str, ...], token: str, order: Order) -> list[Any] | None:
    """The sort keys that a page token holds. Times travel as whole microseconds."""
    by_text, by_time = order.column == "name_folded", order.column.endswith("_at")
    keys = pages.decode(query, token, (str if by_text else int, str))
    if keys is not None and by_time:
        try:
            keys[0] = datetime.fromtimestamp(keys[0] // 1_000_000, UTC).replace(microsecond=keys[0] % 1_000_000)
        except (ValueError, OverflowError, OSError):  # beyond the calendar: not one of ours
            raise pages.invalid("is not a page token") from None
    return keys


def _sortable(row: Any, order: Order) -> str | int:
    """What a row is sorted by, as a page token holds it."""
    value: str | int | datetime = getattr(row, order.column)
    if isinstance(value, datetime):
        return int(value.replace(microsecond=0).timestamp()) * 1_000_000 + value.microsecond
    return value


def _person(row: queries.Person) -> person_query_pb2.PersonSummary:
    return person_query_pb2.PersonSummary(
        person_id=row.person_id,
        name=row.name,
        registered_at=timestamp(row.registered_at),
        open_account_count=row.open_account_count,
        total_balances=[
            person_query_pb2.CurrencyTotal(currency=currency, total_minor=total)
            for currency, total in zip(row.currencies, row.totals_minor, strict=True)
        ],
        version=row.version,
    )


def _account(row: queries.Account) -> account_query_pb2.AccountSummary:
    return account_query_pb2.AccountSummary(
        account_id=row.account_id,
        owner_id=row.owner_id,
        name=row.name,
        currency=row.currency,
        balance_minor=row.balance_minor,
        status=STATUS_OF[row.status],
        opened_at=timestamp(row.opened_at),
        version=row.version,
    )


def _movement(row: queries.Movement) -> account_query_pb2.Movement:
    return account_query_pb2.Movement(
        version=row.version,
        amount_minor=row.amount_minor,
        balance_after_minor=row.balance_after_minor,
        moved_at=timestamp(row.moved_at),
        transfer_id=row.transfer_id,
        counterparty_account_id=row.counterparty_account_id,
    )


def _transfer(row: queries.Transfer) -> transfer_query_pb2.TransferSummary:
    steps = [
        ("started", row.started_at),
        ("debited", row.debited_at),
        ("credited", row.credited_at),
        ("refunded", row.refunded_at),
        ("suspended", row.suspended_at),
        (row.status, row.ended_at),
    ]
    return transfer_query_pb2.TransferSummary(
        transfer_id=row.transfer_id,
        from_account_id=row.from_account_id,
        to_account_id=row.to_account_id,
        amount_minor=row.amount_minor,
        currency=row.currency,
        status=TRANSFER_STATUS_OF[row.status],
        reason=row.reason,
        compensation=transfer_pb2.Compensation.ValueType(row.compensation),
        steps=[
            transfer_query_pb2.TransferStep(name=name, happened_at=timestamp(moment))
            for name, moment in steps
            if moment is not None
        ],
        started_at=timestamp(row.started_at),
        ended_at=None if row.ended_at is None else timestamp(row.ended_at),
    )


def _user(row: queries.User) -> user_query_pb2.UserSummary:
    return user_query_pb2.UserSummary(
        user_id=row.user_id,
        login=row.login,
        email=row.email,
        status=REGISTRATION_STATUS_OF[row.status],
        reason=row.reason,
        started_at=timestamp(row.started_at),
        ended_at=None if row.ended_at is None else timestamp(row.ended_at),
    )


def _projection(standing: Standing) -> projection_pb2.ProjectionStatus:
    return projection_pb2.ProjectionStatus(
        name=standing.name,
        shard=standing.shard,
        epoch=standing.checkpoint.epoch,
        position=standing.checkpoint.position,
        state=STATES[standing.state],
        reason=standing.reason,
        moved_at=None if standing.moved_at is None else timestamp(standing.moved_at),
    )

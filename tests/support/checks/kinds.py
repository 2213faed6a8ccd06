"""Every event of the system by the name of its type, and how an envelope is read."""

from __future__ import annotations

from google.protobuf.message import Message

from bank.v1 import account_pb2, person_pb2, transfer_pb2, user_pb2
from foldline.v1 import archive_pb2, override_pb2, retention_pb2, tenant_pb2
from foldline.v1.event_store_pb2 import EventEnvelope

PURGED, CLOSED = (kind.DESCRIPTOR.full_name for kind in (tenant_pb2.EventPurged, tenant_pb2.TenantClosed))
KINDS: dict[str, type[Message]] = {
    kind.DESCRIPTOR.full_name: kind
    for kind in (
        archive_pb2.AggregateBoxed,
        archive_pb2.AggregateUnboxed,
        override_pb2.OverrideSwitched,
        retention_pb2.RetentionSet,
        tenant_pb2.TenantClosed,
        tenant_pb2.EventPurged,
        person_pb2.PersonRegistered,
        person_pb2.PersonRenamed,
        person_pb2.AccountAttached,
        person_pb2.AccountDetached,
        person_pb2.PersonClosed,
        account_pb2.AccountOpened,
        account_pb2.MoneyDeposited,
        account_pb2.MoneyWithdrawn,
        account_pb2.AccountFrozen,
        account_pb2.AccountUnfrozen,
        account_pb2.AccountClosed,
        account_pb2.MoneySuspended,
        transfer_pb2.TransferStarted,
        transfer_pb2.TransferCompleted,
        transfer_pb2.TransferFailed,
        user_pb2.UserRegistrationStarted,
        user_pb2.UserRegistrationSucceeded,
        user_pb2.UserRegistrationFailed,
        user_pb2.UserEmailChanged,
        user_pb2.UserRolesChanged,
        user_pb2.UserDeactivated,
        user_pb2.LoginReserved,
        user_pb2.LoginConfirmed,
        user_pb2.LoginReleased,
    )
}


def decoded(envelope: EventEnvelope) -> Message:
    """The event in an envelope."""
    return KINDS[envelope.type].FromString(envelope.payload)

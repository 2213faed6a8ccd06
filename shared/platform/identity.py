"""Who is calling: what a verified token says, and where the code of a call finds it."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum

from msgspec import Struct


class Role(StrEnum):
    """What a caller may do. Which RPC asks for which role is one table per service."""

    USER = "user"
    TENANT_ADMIN = "tenant_admin"
    OPERATOR = "operator"
    PROCESS = "process"
    READER = "reader"


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A caller, as the token says."""

    tenant: str
    user_id: str
    roles: frozenset[Role]


class Call(Struct, frozen=True):
    """One call: who makes it, by which full method name, in which W3C trace context."""

    identity: Identity
    method: str
    traceparent: str


current_call: ContextVar[Call] = ContextVar("current_call")

SEE_THE_LINE = frozenset({Role.OPERATOR, Role.PROCESS, Role.READER})
SEE_USERS = frozenset({Role.TENANT_ADMIN, *SEE_THE_LINE})


def seen_position(position: int) -> int:
    """A position as the caller sees it: 0, unless it has a role that may know how far the line of all tenants is."""
    return 0 if SEE_THE_LINE.isdisjoint(current_call.get().identity.roles) else position


def seen_user(user_id: str) -> str:
    """By or for whom a command was sent, as the caller sees it: empty, unless it is the caller or its role may see others."""
    identity = current_call.get().identity
    return user_id if user_id == identity.user_id or not SEE_USERS.isdisjoint(identity.roles) else ""

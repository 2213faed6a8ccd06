"""All refusals. A refusal is raised as an exception inside, and becomes a `google.rpc.Status` at the edge.

Refusal
├── Invalid            INVALID_ARGUMENT     malformed or out of range, or a command id used for another content
├── Unauthenticated    UNAUTHENTICATED      no token, or one that is not valid
├── Forbidden          PERMISSION_DENIED    a role is missing
├── NotFound           NOT_FOUND            absent, or another tenant's: the two are not told apart
├── AlreadyExists      ALREADY_EXISTS
├── Rejected           FAILED_PRECONDITION  a rule of the business, or the state of the aggregate, forbids it
├── VersionMismatch    ABORTED              the caller's `expected_version` is stale
├── BatchAborted       ABORTED              another command of the same atomic batch was refused
├── OverLimit          RESOURCE_EXHAUSTED   too large, too many, too fast
├── Late               DEADLINE_EXCEEDED
├── Unavailable        UNAVAILABLE          the database or a peer is away; the same call may be made again
└── InternalError      INTERNAL             what a caller is told of any other exception: nothing; the log has the rest

This module imports nothing but the standard library, because the domain imports it.
"""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar


class Code(IntEnum):
    """The canonical codes of gRPC and google.rpc that Foldline answers with."""

    CANCELLED = 1
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


class Refusal(Exception):
    """A named refusal.

    `reason` is UPPER_SNAKE and stable: clients branch on it. `text` is for people. `facts` go into the ErrorInfo's
    metadata, as text. `violations` are (field path, description) pairs of bad input. `retry_after_s` says that the
    same call may succeed after so many seconds.
    """

    code: ClassVar[Code]

    def __init__(
        self,
        reason: str,
        text: str,
        *,
        violations: tuple[tuple[str, str], ...] = (),
        retry_after_s: float | None = None,
        **facts: str | int,
    ) -> None:
        super().__init__(text)
        self.reason = reason
        self.text = text
        self.violations = violations
        self.retry_after_s = retry_after_s
        self.facts = {name: str(value) for name, value in facts.items()}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.reason!r}, {self.text!r})"


class Invalid(Refusal):
    """The request is malformed or out of range."""

    code = Code.INVALID_ARGUMENT


class Unauthenticated(Refusal):
    """There is no token, or it is not valid."""

    code = Code.UNAUTHENTICATED


class Forbidden(Refusal):
    """The caller lacks a role."""

    code = Code.PERMISSION_DENIED


class NotFound(Refusal):
    """There is no such thing in the caller's tenant."""

    code = Code.NOT_FOUND


class AlreadyExists(Refusal):
    """There is such a thing already."""

    code = Code.ALREADY_EXISTS


class Rejected(Refusal):
    """A rule of the business forbids it."""

    code = Code.FAILED_PRECONDITION


class VersionMismatch(Refusal):
    """The aggregate is not at the version that the caller expected."""

    code = Code.ABORTED

    def __init__(self, expected: int, actual: int) -> None:
        super().__init__(
            "VERSION_MISMATCH",
            f"version {expected} was expected, the aggregate is at {actual}",
            expected=expected,
            actual=actual,
        )


class BatchAborted(Refusal):
    """The command itself is acceptable, but another command of its atomic batch was refused. It may be sent again."""

    code = Code.ABORTED

    def __init__(self) -> None:
        super().__init__("ATOMIC_BATCH_REFUSED", "another command of the atomic batch was refused")


class OverLimit(Refusal):
    """Too large, too many or too fast."""

    code = Code.RESOURCE_EXHAUSTED


class Late(Refusal):
    """The call's deadline passed. The command may still have been carried out: send it again with the same id."""

    code = Code.DEADLINE_EXCEEDED


class Unavailable(Refusal):
    """Something the service depends on is away. The same call may be made again."""

    code = Code.UNAVAILABLE

    def __init__(self, reason: str, text: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(reason, text, retry_after_s=retry_after_s)


class AggregateUnreadable(Refusal):
    """An event of the aggregate cannot be read, though its type is known. A release that can read it takes the same command."""

    code = Code.INTERNAL

    def __init__(self) -> None:
        super().__init__("AGGREGATE_UNREADABLE", "an event of the aggregate cannot be read by this release of the service")


class ReleaseTooOld(Unavailable):
    """A newer release wrote an event of the aggregate. The same command may come again: a replica of that release takes it."""

    def __init__(self) -> None:
        super().__init__("RELEASE_TOO_OLD", "a newer release wrote an event of the aggregate, and this one cannot read it")


class InternalError(Refusal):
    """The service is at fault. The same command may be sent again under the same id."""

    code = Code.INTERNAL

    def __init__(self) -> None:
        super().__init__("INTERNAL", "the service met a defect; its log has the details")

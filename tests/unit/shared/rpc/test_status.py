"""Refusals on the wire and back."""

from __future__ import annotations

import base64
from urllib.parse import quote

import pytest
from google.rpc import error_details_pb2, status_pb2

from shared.folds.errors import (
    AlreadyExists,
    Code,
    Forbidden,
    InternalError,
    Invalid,
    Late,
    NotFound,
    OverLimit,
    Refusal,
    Rejected,
    Unauthenticated,
    Unavailable,
    VersionMismatch,
)
from shared.rpc.status import from_status, to_status

REFUSALS: list[tuple[Refusal, int]] = [
    (Invalid("COMMAND_ID_REUSED", "used", violations=(("options.command_id", "is used"),)), 3),
    (Late("DEADLINE_EXCEEDED", "late"), 4),
    (NotFound("PERSON_NOT_FOUND", "no"), 5),
    (AlreadyExists("PERSON_ALREADY_REGISTERED", "yes"), 6),
    (Forbidden("ROLE_MISSING", "no"), 7),
    (OverLimit("QUEUE_FULL", "full", retry_after_s=0.25), 8),
    (Rejected("INSUFFICIENT_FUNDS", "poor", balance_minor=7), 9),
    (VersionMismatch(3, 5), 10),
    (Unavailable("DATABASE_AWAY", "away", retry_after_s=2), 14),
    (Unauthenticated("TOKEN_MISSING", "who"), 16),
]


@pytest.mark.parametrize(("refusal", "code"), REFUSALS, ids=lambda value: type(value).__name__)
def test_a_refusal_survives_the_wire(refusal: Refusal, code: int) -> None:
    """Kind, code, reason, text, facts, violations and retry time come out as they went in."""
    status = status_pb2.Status.FromString(to_status(refusal).SerializeToString())
    assert status.code == code
    back = from_status(status)
    assert type(back) is type(refusal)
    assert (back.reason, back.text, back.facts) == (refusal.reason, refusal.text, refusal.facts)
    assert (back.violations, back.retry_after_s) == (refusal.violations, refusal.retry_after_s)


def test_the_details_are_those_of_google_rpc() -> None:
    """Any client can read them: ErrorInfo first, with our domain, then RetryInfo or BadRequest."""
    status = to_status(Invalid("BAD", "bad", violations=(("name", "too long"),), retry_after_s=1.5, limit=3))
    info, retry, bad = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo(), error_details_pb2.BadRequest()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(retry)
    assert status.details[2].Unpack(bad)
    assert (info.reason, info.domain, dict(info.metadata)) == ("BAD", "foldline", {"limit": "3"})
    assert (retry.retry_delay.seconds, retry.retry_delay.nanos) == (1, 500_000_000)
    assert [(violation.field, violation.description) for violation in bad.field_violations] == [("name", "too long")]


def test_a_defect_says_nothing_of_itself() -> None:
    """Whatever the exception holds stays here."""
    status = to_status(RuntimeError("the password is swordfish"))
    assert status.code == Code.INTERNAL
    assert b"swordfish" not in status.SerializeToString()
    assert type(from_status(status)) is InternalError


def test_the_worst_refusal_fits_into_trailers() -> None:
    """GRPC allows 8 KiB: the text percent-encoded and the details in base64 stay below it together."""
    facts = {f"f{n}": "🙂" * 999 for n in range(99)}
    worst = Invalid("R" * 60, "🙂" * 9999, violations=(("🙂" * 999,) * 2,) * 99, retry_after_s=1, **facts)
    status = to_status(worst)
    sent = len(quote(status.message)) + len(base64.b64encode(status.SerializeToString()))
    assert sent < 7800
    assert from_status(status).reason == "R" * 60


def test_a_consistency_token_of_full_length_is_not_cut() -> None:
    """Half of an opaque token would be worse than none."""
    refusal = Rejected("X", "x", consistency_token="t" * 512)
    assert from_status(to_status(refusal)).facts["consistency_token"] == "t" * 512


def test_a_status_of_somebody_else_can_be_read() -> None:
    """A proxy's status has no details: its code's name is the reason."""
    assert from_status(status_pb2.Status(code=14, message="no route")).reason == "UNAVAILABLE"
    assert from_status(status_pb2.Status(code=2, message="?")).reason == "UNKNOWN"

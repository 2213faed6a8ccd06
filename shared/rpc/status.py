"""Turns refusals into `google.rpc.Status` and back. No other module decides what an error looks like on the wire."""

from __future__ import annotations

import re

from google.protobuf import duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode
from grpc.aio import AioRpcError

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

DOMAIN = "foldline"
DETAILS_KEY = "grpc-status-details-bin"

# gRPC allows 8 KiB of trailers. Details travel in base64 and hold the text, which travels once more, percent-encoded:
# with these limits the worst text (four bytes a character) and full details stay below that together.
DETAILS_SIZE_MAX = 3072
_TEXT_MAX = 256
_FACT_MAX = 512
_FACTS_SIZE_MAX = 1536
_DESCRIPTION_MAX = 200

_GRPC_CODES = {code.value[0]: code for code in StatusCode}


class Unexpected(Refusal):
    """Only to be read: a status that Foldline itself never answers with, for example a proxy's."""

    code = Code.UNIMPLEMENTED


_REFUSALS: dict[int, type[Refusal]] = {
    Code.INVALID_ARGUMENT: Invalid,
    Code.UNAUTHENTICATED: Unauthenticated,
    Code.PERMISSION_DENIED: Forbidden,
    Code.NOT_FOUND: NotFound,
    Code.ALREADY_EXISTS: AlreadyExists,
    Code.FAILED_PRECONDITION: Rejected,
    Code.ABORTED: VersionMismatch,
    Code.RESOURCE_EXHAUSTED: OverLimit,
    Code.DEADLINE_EXCEEDED: Late,
    Code.UNAVAILABLE: Unavailable,
    Code.INTERNAL: InternalError,
}


def to_status(error: BaseException) -> status_pb2.Status:
    """The refusal for a caller. Any other exception is a defect: the caller learns only that there was one."""
    if not isinstance(error, Refusal):
        error = InternalError()
    status = status_pb2.Status(code=int(error.code), message=_cut(error.text, _TEXT_MAX))
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)
    for name, value in error.facts.items():
        info.metadata[name] = _cut(value, _FACT_MAX)
        if info.ByteSize() > _FACTS_SIZE_MAX:
            del info.metadata[name]
    _pack(status, info)
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        _pack(status, error_details_pb2.RetryInfo(retry_delay=delay))
    if error.violations:
        bad = error_details_pb2.BadRequest()
        room = DETAILS_SIZE_MAX - status.ByteSize() - len(bad.DESCRIPTOR.full_name) - 40
        for field, text in error.violations:
            bad.field_violations.add(field=_cut(field, _DESCRIPTION_MAX), description=_cut(text, _DESCRIPTION_MAX))
            if bad.ByteSize() > room:
                del bad.field_violations[-1]
                break
        _pack(status, bad)
    return status


def from_status(status: status_pb2.Status) -> Refusal:
    """The refusal that a status stands for, for a log row, a receipt's `error` or a caller."""
    info, retry, bad = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo(), error_details_pb2.BadRequest()
    retry_after_s = None
    for packed in status.details:
        if packed.Unpack(retry):
            retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
        else:
            packed.Unpack(info) or packed.Unpack(bad)
    # Some kinds take other arguments; what counts is what came, so the common initializer is called for all.
    kind = _REFUSALS.get(status.code, Unexpected)
    refusal = kind.__new__(kind)
    Refusal.__init__(
        refusal,
        info.reason or _code_name(status.code),
        status.message,
        violations=tuple((violation.field, violation.description) for violation in bad.field_violations),
        retry_after_s=retry_after_s,
    )
    refusal.facts = dict(info.metadata)
    return refusal


def from_rpc_error(error: AioRpcError) -> Refusal:
    """The refusal that a failed call stands for. If gRPC or a proxy failed it, the reason is the code's name.

    A service whose certificate is not trusted is CERTIFICATE_NOT_TRUSTED.
    """
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            try:
                return from_status(status_pb2.Status.FromString(value))
            except DecodeError:
                break
    details = error.details() or ""
    if error.code() is StatusCode.UNAVAILABLE and (why := _UNTRUSTED.search(details)):
        return Unavailable("CERTIFICATE_NOT_TRUSTED", _untrusted(why["why"]))
    return from_status(status_pb2.Status(code=error.code().value[0], message=details))


# What gRPC says of a server that could not be told to be the one that was meant.
_UNTRUSTED = re.compile(r"CERTIFICATE_VERIFY_FAILED: (?P<why>[a-z ]+)|(?P<name>Hostname Verification Check failed)")


def _untrusted(why: str | None) -> str:
    return f"the certificate of the service is not trusted: {why or 'it is for another host'}"


def trailers(status: status_pb2.Status) -> tuple[StatusCode, str, tuple[tuple[str, bytes], ...]]:
    """The status as gRPC sends it: code, text, trailing metadata."""
    return _GRPC_CODES[status.code], status.message, ((DETAILS_KEY, status.SerializeToString()),)


def _code_name(number: int) -> str:
    code = _GRPC_CODES.get(number)
    return code.name if code else "UNKNOWN"


def _cut(text: str, length_max: int) -> str:
    return text if len(text) <= length_max else text[: length_max - 1] + "…"


def _pack(status: status_pb2.Status, detail: Message) -> None:
    status.details.add().Pack(detail)

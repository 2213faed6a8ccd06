"""Which part of the line ReadStreams reads, and how its events go into messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime

from msgspec import Struct

from foldline.v1 import as_of_pb2, event_store_pb2
from shared.folds.errors import Forbidden, Rejected
from shared.line.consistency import Token, decode
from shared.line.event_store import Head
from shared.platform.identity import SEE_THE_LINE, current_call
from shared.platform.seal import Seal
from shared.rpc.bounds import rules_broken
from shared.rpc.validation import moment_of

MESSAGE_BYTES_MAX = 2 * 1024 * 1024


class Bounds(Struct, frozen=True):
    """Positions behind `after`, and not behind `upto`; only events that were appended at `moment` or before, if it is set."""

    after: int
    upto: int
    moment: datetime | None = None


def bounds_of(request: event_store_pb2.ReadStreamsRequest, head: Head, seal: Seal) -> Bounds:
    """What a request asks for of a line that ends at `head`.

    Raises Invalid (INVALID_REQUEST, CONSISTENCY_TOKEN_MALFORMED), Rejected (POSITION_NOT_REACHED, TOKEN_OF_ANOTHER_HISTORY), or
    Forbidden (ROLE_MISSING) for a caller who may not see positions.
    """
    after = _place(request.after_token, "after_token", head, seal) if request.after_token else 0
    if not request.HasField("as_of"):
        return Bounds(after, head.position)
    as_of: as_of_pb2.AsOf = request.as_of
    match as_of.WhichOneof("when"):
        case "moment":
            return Bounds(after, head.position, moment_of(as_of.moment, "as_of.moment"))
        case "token":
            return Bounds(after, _place(as_of.token, "as_of.token", head, seal))
        case "position":
            if SEE_THE_LINE.isdisjoint(current_call.get().identity.roles):
                needed = ", ".join(sorted(SEE_THE_LINE))
                raise Forbidden("ROLE_MISSING", f"to ask by position needs one of the roles: {needed}", roles=needed)
            if as_of.position > head.position:
                raise Rejected("POSITION_NOT_REACHED", f"the line ends at position {head.position}", head_position=head.position)
            return Bounds(after, as_of.position)
    raise rules_broken(("as_of", "must say when: a moment, a position or a token"))


def _place(text: str, field: str, head: Head, seal: Seal) -> int:
    """The position that a token of the caller's tenant names."""
    token: Token = decode(text, seal, current_call.get().identity.tenant, field=field)
    if token.shard != head.shard or token.epoch != head.epoch or token.position > head.position:
        raise Rejected("TOKEN_OF_ANOTHER_HISTORY", "the token names a place of another history than the line has now")
    return token.position


def in_messages(envelopes: Sequence[event_store_pb2.EventEnvelope]) -> Iterator[Sequence[event_store_pb2.EventEnvelope]]:
    """The events in parts that go into one message each."""
    part: list[event_store_pb2.EventEnvelope] = []
    size = 0
    for envelope in envelopes:
        taken = envelope.ByteSize()
        if part and size + taken > MESSAGE_BYTES_MAX:
            yield part
            part, size = [], 0
        part.append(envelope)
        size += taken
    if part:
        yield part

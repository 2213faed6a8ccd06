"""Events of the past, which the write service tells on behalf of the caller.

The call carries the caller's own token, so it is answered with what the caller may read, in the caller's tenant, and takes the
caller's share of the write service's places.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from grpc import aio
from msgspec import Struct

from foldline.v1 import as_of_pb2, event_store_pb2, event_store_pb2_grpc
from foldline.v1.event_store_pb2 import EventEnvelope
from shared.folds.errors import OverLimit, Refusal, Unavailable
from shared.folds.summary import AggregateName
from shared.folds.upcasting import Upcasters
from shared.line.consistency import Token, decode_places, encode
from shared.platform.identity import current_call
from shared.platform.seal import NotOurs, Seal
from shared.platform.telemetry import logger
from shared.rpc.client import connected
from shared.rpc.status import Unexpected, from_rpc_error

log = logger(__name__)

NAMES_MAX = 500
"""So many aggregates one call of the write service is asked for."""
READ_S_MAX = 30.0
"""The time limit of one reading, for a caller without one."""


class PastPage(Struct, frozen=True):
    """Events in the order of the line, with their positions, and the epoch of their history."""

    epoch: str
    events: Sequence[EventEnvelope]


class PastEvents:
    """The events of aggregates of a caller's tenant, from the write service."""

    def __init__(self, channel: aio.Channel, seal: Seal, shard: int, events_max: int, upcasters: Upcasters) -> None:
        """`channel` leads to the write service, which may be of an older release. `events_max`: of one reading."""
        self._channel = channel
        self._stub = event_store_pb2_grpc.EventStoreServiceStub(channel)
        self._seal = seal
        self._shard = shard
        self._upcasters = upcasters
        self.events_max = events_max

    def token(self, epoch: str, position: int) -> str:
        """The place of an event, as the caller's tenant sees it."""
        return encode(Token(self._shard, epoch, position), self._seal, current_call.get().identity.tenant)

    async def read(
        self, names: Sequence[AggregateName], context: Any, *, after: str = "", as_of: as_of_pb2.AsOf | None = None
    ) -> AsyncGenerator[PastPage, None]:
        """The events of the aggregates behind the place `after`, up to `as_of`, in pages, with the contracts of today.

        Raises OverLimit (HISTORY_TOO_LONG) when there is one more than `events_max`, Unavailable (WRITE_SERVICE_UNAVAILABLE,
        SEAL_KEYS_DIFFER), or the refusal of the write service.
        """
        if len(names) > NAMES_MAX:
            raise self.too_long()
        request = event_store_pb2.ReadStreamsRequest(after_token=after, as_of=as_of, events_max=self.events_max + 1)
        for category, id_ in names:
            request.aggregates.add(aggregate_type=category, aggregate_id=id_)
        if not await connected(self._channel):
            raise _away()
        tenant, left_s = current_call.get().identity.tenant, context.time_remaining()
        call = self._stub.ReadStreams(request, metadata=_own(context), timeout=READ_S_MAX if left_s is None else left_s)
        left = self.events_max
        try:
            async for answer in call:
                epoch, positions = decode_places(answer.sealed_positions, self._seal, tenant)
                for envelope, position in zip(answer.events, positions, strict=True):
                    envelope.position = position
                self._upcasters.update(answer.events)
                # Who has found an end among those that are within the limit asks for no more.
                yield PastPage(epoch, answer.events[:left])
                if (left := left - len(answer.events)) < 0:
                    raise self.too_long()
        except aio.AioRpcError as error:
            raise _refusal(error) from error
        except NotOurs:
            text = "the write service seals with keys that this instance was not given: see FOLDLINE_SEAL_KEYS"
            log.warning("seal_keys_differ", text=text)
            raise Unavailable("SEAL_KEYS_DIFFER", text) from None
        finally:
            call.cancel()

    def too_long(self) -> Refusal:
        """The refusal of a history with more events than are read."""
        text = f"it would have to be folded from more than {self.events_max} events"
        return OverLimit("HISTORY_TOO_LONG", text, events_max=self.events_max)


def _own(context: Any) -> tuple[tuple[str, str], ...]:
    """The metadata of a call in the caller's name."""
    header = next(value for name, value in context.invocation_metadata() if name == "authorization")
    return ("authorization", header), ("traceparent", current_call.get().traceparent)


def _refusal(error: aio.AioRpcError) -> Refusal:
    """What the caller is told of a call that the write service refused, or did not answer."""
    refusal = from_rpc_error(error)
    if isinstance(refusal, Unexpected) or refusal.reason == refusal.code.name:  # gRPC itself or a proxy, not the service
        return _away()
    return refusal


def _away() -> Refusal:
    return Unavailable("WRITE_SERVICE_UNAVAILABLE", "the write service, which has the past, does not answer")

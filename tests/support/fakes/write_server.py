"""A gRPC server in this process that the saga service takes for the write service: a line in memory, and answers of a test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from grpc import aio

from foldline.v1 import command_pb2, command_pb2_grpc, event_store_pb2, event_store_pb2_grpc
from tests.support.domains.gifts import WriteService
from tests.support.fakes.line import Store, StoreLine


class _EventStore(event_store_pb2_grpc.EventStoreServiceServicer):
    def __init__(self, store: Store) -> None:
        self._line = StoreLine(store)

    async def ReadAll(  # noqa: N802 (the RPC's name)
        self, request: event_store_pb2.ReadAllRequest, context: Any
    ) -> AsyncIterator[event_store_pb2.ReadAllResponse]:
        async for page in self._line.read(request.from_position, request.events_max):
            yield event_store_pb2.ReadAllResponse(events=page.events, head_position=page.head, epoch=page.epoch, shard=1)


class _Commands(command_pb2_grpc.CommandServiceServicer):
    def __init__(self, write: WriteService) -> None:
        self._write = write

    async def SendBatch(  # noqa: N802 (the RPC's name)
        self, request: command_pb2.SendBatchRequest, context: Any
    ) -> command_pb2.SendBatchResponse:
        answer: command_pb2.SendBatchResponse = await self._write.send_batch(
            request, timeout=10, metadata=tuple(context.invocation_metadata())
        )
        return answer

    async def SendStream(  # noqa: N802 (as above)
        self, request_iterator: AsyncIterator[command_pb2.SendStreamRequest], context: Any
    ) -> AsyncIterator[command_pb2.SendStreamResponse]:
        async for request in request_iterator:
            answer = await self.SendBatch(command_pb2.SendBatchRequest(items=[request.item]), context)
            yield command_pb2.SendStreamResponse(receipt=answer.receipts[0])


@asynccontextmanager
async def writing(store: Store, write: WriteService) -> AsyncIterator[str]:
    """The address of a server over a line and a write service."""
    server = aio.server()
    event_store_pb2_grpc.add_EventStoreServiceServicer_to_server(_EventStore(store), server)  # type: ignore[abstract]  # one RPC is called
    command_pb2_grpc.add_CommandServiceServicer_to_server(_Commands(write), server)  # type: ignore[abstract]  # as above
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)

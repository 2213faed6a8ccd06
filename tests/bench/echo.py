"""The ceiling of RPCs: a bare grpc.aio server on uvloop that answers each request with the bytes that came.

No interceptors, no metadata, no decoding: what is left is gRPC and the loop. Writes its port on standard output.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import uvloop
from grpc import aio

SERVICE = "bench.Echo"
UNARY = f"/{SERVICE}/Unary"
STREAM = f"/{SERVICE}/Stream"


async def unary(request: bytes, context: Any) -> bytes:
    """The request."""
    return request


async def stream(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
    """The requests."""
    async for request in requests:
        yield request


async def serve() -> None:
    """Serves until standard input ends, as it does when the bench ends, however that happens."""
    server = aio.server()
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "Unary": grpc.unary_unary_rpc_method_handler(unary),
        "Stream": grpc.stream_stream_rpc_method_handler(stream),
    }
    # By name alone, as ours are: registered ones are waited for one by one, which costs a little at every call.
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    sys.stdout.write(f'{{"port": {port}}}\n')
    sys.stdout.flush()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.stop(None)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())

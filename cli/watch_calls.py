"""The calls behind `foldline watch`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from grpc.aio import AioRpcError

from cli import contract
from cli.calls import Refused, plain
from cli.channels import channel
from cli.endpoints import Endpoints
from shared.rpc.client import bearer
from shared.rpc.status import from_rpc_error

AGAIN_S = 0.5
PASSES = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "RESOURCE_EXHAUSTED")


async def watch(endpoints: Endpoints, tenant: str, name: str, key: str, resume: str) -> AsyncIterator[dict[str, Any]]:
    """A row as it is and as it changes, each with its resume token. Goes on by itself where the server ended. Raises Refused."""
    rpc, request, answer_type = contract.watch(name, key)
    request.resume_token = resume
    began = False
    async with channel(endpoints.read, retries=False) as read:
        method = read.unary_stream(rpc, type(request).SerializeToString, answer_type.FromString)
        while True:
            call = method(request, metadata=bearer(endpoints.token(tenant)))
            try:
                async for answer in call:
                    request.resume_token, began = answer.resume_token, True
                    if answer.HasField(name):
                        yield {name: plain(getattr(answer, name)), "resume_token": answer.resume_token}
            except AioRpcError as error:
                refusal = from_rpc_error(error)
                if refusal.code.name not in PASSES or not began:
                    raise Refused(refusal) from None
            finally:
                call.cancel()
            await asyncio.sleep(AGAIN_S)

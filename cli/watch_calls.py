"""The calls behind `foldline watch`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
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
    async for answer in _answers(endpoints, tenant, contract.watch(name, key), resume):
        if answer is not None and answer.HasField(name):
            yield {name: plain(getattr(answer, name)), "resume_token": answer.resume_token}


async def watch_list(
    endpoints: Endpoints, tenant: str, name: str, wanted: Mapping[str, str], resume: str
) -> AsyncIterator[dict[str, Any]]:
    """What enters, changes and leaves a list: `change`, the row's id, and the row unless it left; goes on by itself.

    A list that begins anew, because too much happened while the watch was broken off, brings what differs from what was told
    before. The last change of each place of the line has a resume token. Raises Refused.
    """
    held: dict[str, Any] = {}
    part: list[Any] = []
    begins_anew = False
    async for answer in _answers(endpoints, tenant, contract.watch_list(name, wanted), resume):
        if answer is None:
            part, begins_anew = [], False
            continue
        begins_anew |= answer.begins_anew
        part += answer.changes
        if not answer.resume_token:  # more belongs to this
            continue
        now = {} if begins_anew else dict(held)
        ids = dict.fromkeys(getattr(change, f"{name}_id") for change in part)
        for change in part:
            now[getattr(change, f"{name}_id")] = getattr(change, name) if change.HasField(name) else None
        known = dict.fromkeys((*held, *ids)) if begins_anew else ids
        told = [id_ for id_ in known if now.get(id_) != held.get(id_) or (resume and id_ not in held)]
        for id_ in told:
            row = now.get(id_)
            kind = "left" if row is None else "entered" if id_ not in held else "changed"
            shown = {} if row is None else {name: plain(row)}
            yield {"change": kind, f"{name}_id": id_, **shown, "resume_token": answer.resume_token if id_ == told[-1] else ""}
        held, part, begins_anew = {id_: row for id_, row in now.items() if row is not None}, [], False


async def _answers(endpoints: Endpoints, tenant: str, asked: tuple[str, Any, type[Any]], resume: str) -> AsyncIterator[Any]:
    """The answers of a watch; goes on behind the last resume token where the server ended, which None says. Raises Refused."""
    rpc, request, answer_type = asked
    request.resume_token = resume
    began = False
    async with channel(endpoints.read, retries=False) as read:
        method = read.unary_stream(rpc, type(request).SerializeToString, answer_type.FromString)
        while True:
            call = method(request, metadata=bearer(endpoints.token(tenant)))
            try:
                async for answer in call:
                    request.resume_token, began = answer.resume_token or request.resume_token, True
                    yield answer
            except AioRpcError as error:
                refusal = from_rpc_error(error)
                if refusal.code.name not in PASSES or not began:
                    raise Refused(refusal) from None
            finally:
                call.cancel()
            await asyncio.sleep(AGAIN_S)
            yield None

"""What every process answers whoever runs it: gRPC health, and three pages over HTTP."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import uuid4

import grpc.aio
import orjson
import psycopg
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.local.system import PROJECTOR, READ, RELAY, SAGA, WRITE
from tests.support.clients.bank import Bank, channels
from tests.support.system.stack import Stack
from tests.support.system.waiting import eventually


async def page(port: int, path: str) -> tuple[int, bytes]:
    """The status and the body of a page of an admin port."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    head, _, body = (await asyncio.wait_for(reader.read(), 10)).partition(b"\r\n\r\n")
    writer.close()
    return int(head.split(b" ")[1]), body


async def says(stack: Stack, name: str, expected: dict[str, Any]) -> bool:
    """Whether /readyz of a process says so."""
    try:
        status, body = await page(stack.programs[name].admin_port, "/readyz")
    except OSError:  # it is starting
        return False
    assert status == (200 if orjson.loads(body)["ready"] else 503)
    return bool(orjson.loads(body) == expected)


@pytest.mark.parametrize("name", [WRITE, RELAY, READ, PROJECTOR, SAGA])
async def test_every_process_answers_probes(shared_stack: Stack, name: str) -> None:
    """Liveness and readiness over gRPC, and /healthz, /readyz and /metrics on one admin port."""
    program = shared_stack.programs[name]

    await eventually(lambda: says(shared_stack, name, {"ready": True, "waits_for": {}}), 20)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{program.health_port}") as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        for service in ("liveness", "readiness"):
            answer = await check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert (await page(program.admin_port, "/healthz"))[0] == 200
    status, metrics = await page(program.admin_port, "/metrics")
    assert status == 200
    assert b"process_memory_usage_bytes" in metrics


async def test_what_keeps_a_leader_from_its_work_is_told(stack: Stack) -> None:
    """The relay is not ready while NATS is away, the projector when its tables stopped. Both are alive."""
    async with channels(stack) as (write, read):
        bank = Bank(write, read, stack.token())
        person_id, receipt = await bank.register("Ada")
        await bank.person(person_id, receipt.consistency_token)
    await eventually(lambda: says(stack, RELAY, {"ready": True, "waits_for": {}}), 20)
    stack.nats.stop()
    await eventually(lambda: says(stack, RELAY, {"ready": False, "waits_for": {"broker": "NATS is away"}}), 20)
    assert (await page(stack.programs[RELAY].admin_port, "/healthz"))[0] == 200

    await stack.stop(PROJECTOR)
    async with await psycopg.AsyncConnection.connect(stack.databases.read.owner) as connection:
        await connection.execute("UPDATE checkpoints SET event_id = %s", (str(uuid4()),))  # another history's
    stack.start(PROJECTOR)
    diverged = "; ".join(f"{name}: HISTORY_DIVERGED" for name in ("people", "accounts", "transfers", "users"))
    await eventually(lambda: says(stack, PROJECTOR, {"ready": False, "waits_for": {"projection": diverged}}), 30)
    assert (await page(stack.programs[PROJECTOR].admin_port, "/healthz"))[0] == 200

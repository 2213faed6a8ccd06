"""A write service in this process, as `write_service.app.build` serves it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from grpc import aio

from deploy.bootstrap import Database
from shared.platform.postgres import Reads
from shared.platform.tokens import DevelopmentIssuer
from shared.rpc.client import channel
from tests.support.system.sealing import KEYS
from write_service.app import WriteSettings, build


@asynccontextmanager
async def write_server(database: Database, issuer: DevelopmentIssuer, **settings: Any) -> AsyncIterator[aio.Channel]:
    """A channel to the service, which trusts the issuer's tokens. At the end it drains, as after SIGTERM."""
    made = WriteSettings(
        database_url=database.app,  # type: ignore[arg-type]
        jwks_file=issuer.jwks_file,
        seal_keys=KEYS,  # type: ignore[arg-type]
        **settings,
    )
    reads = Reads(database.app, application_name="foldline-write")
    await reads.open()
    server = build(made, reads)
    server.on_drained(reads.close, last=True)
    port = await server.start()
    async with channel(f"127.0.0.1:{port}") as to_it:
        yield to_it
    await server.drain()

"""A read service over a fresh database."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from grpc import aio

from deploy.bootstrap import Database
from read_service.app import TABLES as WATCHED
from read_service.app import ReadSettings, build
from shared.platform.postgres import Reads
from shared.platform.startup import until_safe
from shared.platform.tokens import DevelopmentIssuer
from tests.support.system.query_service import Service
from tests.support.system.sealing import KEYS


@pytest.fixture
async def service(read_db: Database, tmp_path: Path) -> AsyncIterator[Service]:
    """The service over a fresh database."""
    issuer = DevelopmentIssuer(tmp_path)
    settings = ReadSettings(query_database_url=read_db.query, jwks_file=issuer.jwks_file, seal_keys=KEYS)  # type: ignore[call-arg, arg-type]
    assert read_db.query
    reads = Reads(read_db.query, application_name="foldline-read")
    await reads.open()
    await until_safe(reads, tables=WATCHED)
    server = build(settings, reads)
    server.on_drained(reads.close)
    port = await server.start()
    async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Service(read_db, issuer, channel)
    await server.drain()

"""A process that cannot start says why in one line and ends by itself, with nothing left that would keep it."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.bootstrap import Database
from shared.platform.tokens import DevelopmentIssuer

END_S = 60  # seconds, on a machine that is busy with other tests


@pytest.fixture
def taken() -> Iterator[str]:
    """An address that another listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize(
    ("module", "told", "sentence"),
    [
        ("write_service", {"JWKS_FILE": "/not/there"}, "FOLDLINE_JWKS_FILE: /not/there cannot be read: No such file"),
        ("write_service", {"LISTEN": "taken"}, "cannot be listened on: it is taken, or not this machine's"),
        ("write_service", {"DATABASE_URL": "owner"}, "the role may write"),
        ("write_service.relay", {"ADMIN_LISTEN": "taken"}, "cannot be listened on: error while attempting to bind"),
    ],
)
async def test_what_cannot_be_used_is_one_line_and_exit_code_1(
    module: str, told: dict[str, str], sentence: str, write_db: Database, taken: str, tmp_path: Path
) -> None:
    """It does not live on, silent and deaf to SIGTERM, because something that it opened never ends."""
    words = {"taken": taken, "owner": write_db.owner}
    settings = {"DATABASE_URL": write_db.app, **{name: words.get(value, value) for name, value in told.items()}}
    if module == "write_service":
        settings = {"JWKS_FILE": str(DevelopmentIssuer(tmp_path).jwks_file), "SEAL_KEYS": "00" * 32, **settings}
    else:
        settings["NATS_URL"] = "nats://127.0.0.1:4222"
    plain = {name: value for name, value in os.environ.items() if not name.startswith("FOLDLINE_")}
    environment = plain | {f"FOLDLINE_{name}": value for name, value in settings.items()}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, env=environment, stderr=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(END_S):
            printed, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    [line] = [line for line in printed.decode().splitlines() if "process_refuses_to_run" in line]
    assert process.returncode == 1
    assert sentence in line
    assert "Traceback" not in printed.decode()
    assert "password" not in line

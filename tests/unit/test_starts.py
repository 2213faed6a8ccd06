"""What a process imports before it serves: each library that it can do without makes every start slower."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Each takes 0.2 s of a processor or more.
NOT_AT_START = {
    "aiosmtplib",
    "alembic",
    "httpx",
    "limits",
    "opentelemetry.sdk",
    "prometheus_client",
    "protovalidate",
    "rich",
    "sqlalchemy",
}
SERVERS_ONLY = {"joserfc", "shared.rpc.server"}


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("write_service.__main__", NOT_AT_START),
        ("write_service.relay", NOT_AT_START | SERVERS_ONLY),
        ("read_service.__main__", NOT_AT_START),
        ("read_service.projector", NOT_AT_START | SERVERS_ONLY),
        ("saga_service.__main__", NOT_AT_START),
    ],
)
def test_a_start_imports_no_more_than_it_needs(module: str, unwanted: set[str]) -> None:
    """What only some processes, or only the first invalid request, scrape or webhook need, is imported then."""
    package, _, name = module.rpartition(".")
    told = f"import sys; sys.path.insert(0, 'protos'); from {package} import {name}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", told], check=True, capture_output=True, text=True)  # noqa: S603 (of ours)
    imported = done.stdout.split()
    assert not unwanted & set(imported)


def test_make_keeps_compiled_what_is_imported_whatever_is_set_outside() -> None:
    """Else every process would compile all that it imports, and take twice as long to start."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(
        ["make", "--eval", "seen: ; @env", "seen"],  # noqa: S607 (whichever make runs the tests)
        cwd=ROOT,
        env={**outside, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPYCACHEPREFIX": "/nowhere"},
        check=True,
        capture_output=True,
        text=True,
    )
    seen = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
    assert "PYTHONDONTWRITEBYTECODE" not in seen
    assert seen["PYTHONPYCACHEPREFIX"].endswith("/bytecode")

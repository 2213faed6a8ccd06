"""PostgreSQL 15 and NATS 2.9 themselves: the bootstrap and every process refuse them by name, and make nothing on them."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.containers.composed import SERVING, Composed
from tests.containers.engine import Failed, Podman
from tests.containers.images import ROOT, Images
from tests.support.system.waiting import eventually

pytestmark = [pytest.mark.containers, pytest.mark.timeout(600)]
SERVICES = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"]
POSTGRES, NATS, REFUSED = (f"foldline-test-{name}" for name in ("old-postgres", "old-nats", "refused"))
POSTGRES_TOO_OLD = "POSTGRES_TOO_OLD: this is PostgreSQL 15, and 17 or newer is needed"
NATS_TOO_OLD = "NATS_TOO_OLD: this is NATS 2.9, and 2.11 or newer is needed"
ENDS_S = 60.0
OURS = """
SELECT count(*) FROM (SELECT datname FROM pg_database UNION SELECT rolname FROM pg_roles) AS made (name)
WHERE name LIKE 'foldline%'
"""


@dataclass(frozen=True, slots=True)
class OldEngines:
    """Both, in the network of compose."""

    composed: Composed
    nats_address: str
    folder: Path
    """With `admin` and `app`: the URLs of PostgreSQL's administrator and of a role without rights of its own."""

    @property
    def podman(self) -> Podman:
        """The container engine."""
        return self.composed.podman

    def sql(self, statement: str) -> str:
        """What the administrator is answered."""
        return self.podman("exec", POSTGRES, "psql", (self.folder / "inside").read_text(), "--tuples-only", "-c", statement)

    def refused(self, service: str, environment: dict[str, str]) -> str:
        """What a service of compose says before it ends by itself with an error, run with other engines than compose's."""
        given = [part for name, value in environment.items() for part in ("--env", f"{name}={value}")]
        mounted = ["--volume", f"{self.folder}:/old:ro"]
        try:
            self.composed("run", "--rm", "--no-deps", "-T", "--name", REFUSED, *given, *mounted, service, within_s=ENDS_S)
        except Failed as failed:
            return str(failed)
        finally:
            self.podman("rm", "--force", "--ignore", "--time", "0", REFUSED)
        raise AssertionError(f"{service} ended without an error")


@pytest.fixture(scope="module")
def old(composed: Composed, images: Images, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OldEngines]:
    """Both, and removed behind the tests."""
    podman, folder = composed.podman, tmp_path_factory.mktemp("old")
    folder.chmod(0o755)  # the containers run under accounts of their own
    password = secrets.token_urlsafe(16)
    (folder / "password").write_text(password)

    def run(name: str, *arguments: str) -> str:
        podman("rm", "--force", "--ignore", "--time", "0", name)
        podman("run", "--detach", "--name", name, "--network", composed.network, *arguments)
        return str(podman.inspect(name)["NetworkSettings"]["Networks"][composed.network]["IPAddress"])

    try:
        given = ["--volume", f"{folder}:/old:ro", "--env", "POSTGRES_PASSWORD_FILE=/old/password"]
        address = run(POSTGRES, *given, images.old_postgres)
        for file, host, user in (("inside", "127.0.0.1", "postgres"), ("admin", address, "postgres"), ("app", address, "app")):
            (folder / file).write_text(f"postgresql://{user}:{password}@{host}:5432/postgres")
        yield OldEngines(composed, run(NATS, images.old_nats, "-js"), folder)
    finally:
        for name in (POSTGRES, NATS):
            podman("rm", "--force", "--ignore", "--volumes", "--time", "0", name)


async def test_the_bootstrap_makes_nothing_on_an_old_postgresql(old: OldEngines) -> None:
    """One sentence and exit code 2, before any database or role is made."""
    said = old.refused("bootstrap", {"DATABASE_URL_FILE": "/old/admin"})
    assert "code 2\n" in said
    assert POSTGRES_TOO_OLD in said
    assert old.sql(OURS).strip() == "0"


@pytest.mark.parametrize("service", SERVING)
async def test_a_process_does_not_run_on_an_old_postgresql(old: OldEngines, service: str) -> None:
    """It says so and ends, although the tables that it would wait for are not there."""

    def may_connect() -> bool:
        try:
            old.sql(f"DROP ROLE IF EXISTS app; CREATE ROLE app LOGIN PASSWORD '{(old.folder / 'password').read_text()}'")
        except Failed:  # it is starting
            return False
        return True

    await eventually(may_connect, ENDS_S, every_s=0.5)
    [url] = [name for name in SERVICES[service]["environment"] if name.endswith("DATABASE_URL_FILE")]
    said = old.refused(service, {url: "/old/app"})
    assert "code 1\n" in said
    assert f'"error":"{POSTGRES_TOO_OLD}' in said
    assert "process_refuses_to_run" in said


async def test_the_relay_does_not_run_on_an_old_nats(composed: Composed, old: OldEngines) -> None:
    """A stream there would not begin at the line's position."""
    await composed.ready()
    said = old.refused("relay", {"FOLDLINE_NATS_URL": f"nats://{old.nats_address}:4222"})
    assert "code 1\n" in said
    assert f'"error":"{NATS_TOO_OLD}' in said
    assert "process_refuses_to_run" in said

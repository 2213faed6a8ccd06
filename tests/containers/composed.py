"""deploy/compose.yaml, brought up as it is, on ports of its own and with volumes of its own."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from deploy.engines.child import free_port
from tests.containers.engine import Failed, Podman, program, run
from tests.containers.images import ROOT, Images
from tests.support.system.waiting import eventually

PROJECT = "foldline-test"
SERVING = ("write", "relay", "read", "projector", "saga")
UP_S = 300.0
# podman-compose waits for the conditions of compose.yaml by itself, and tells podman of the same dependencies once more.
# Podman would run those again that have ended, as the one-off jobs have: it is not told.
WITHOUT_REQUIRES = """#!/bin/sh
for argument do
  shift
  case $argument in --requires=*) ;; *) set -- "$@" "$argument" ;; esac
done
exec podman "$@"
"""
READY_S = 120.0
# Docker's program, as far as README's first session uses it. Docker runs a service that is named whatever its profile, and gives
# a container a terminal only if there is one; podman-compose has to be told.
DOCKER = """#!/bin/bash
test "$1" = compose && shift
given=()
for argument do
  given+=("$argument")
  test "$argument" = run && given+=(-T)
done
exec {compose} --podman-path {podman} --project-name {project} --profile tools "${{given[@]}}"
"""

ASKING = """
import json, sys, urllib.request
answers = [json.load(urllib.request.urlopen("http://prometheus:9090" + path, timeout=5)) for path in sys.argv[1:]]
print(json.dumps([answer["data"] for answer in answers]))
"""


class Composed:
    """The whole system in containers, as seen by somebody who has only its ports and its files."""

    def __init__(self, podman: Podman, images: Images, folder: Path) -> None:
        """`folder` is for what podman-compose is given."""
        self.podman = podman
        self._engine = folder / "podman-without-requires"
        self._engine.write_text(WITHOUT_REQUIRES)
        self._engine.chmod(0o755)
        self.ports = {name: free_port() for name in ("write", "read", "saga")}
        self._environment = {
            **podman.environment,
            "FOLDLINE_IMAGE": images.foldline,
            "MAIL_IMAGE": images.mail,
            "POSTGRES_IMAGE": images.postgres,
            "NATS_IMAGE": images.nats,
            "PROMETHEUS_IMAGE": images.prometheus,
            **{f"{name.upper()}_PORT": str(port) for name, port in self.ports.items()},
        }

    @property
    def network(self) -> str:
        """The name of the network that all containers are in."""
        return f"{PROJECT}_default"

    def up(self) -> None:
        """Starts everything; raises Failed with the containers' last words if that does not end well."""
        self("up", "--detach", "--no-build", within_s=UP_S)

    def down(self) -> None:
        """Stops everything and deletes it, data included. Nothing to do is no error."""
        self("--profile", "observe", "down", "--volumes", "--timeout", "15", within_s=UP_S)

    def __call__(self, *arguments: str, within_s: float = 120) -> str:
        """What the compose program prints."""
        which: list[str | Path] = [
            "--podman-path",
            self._engine,
            "--project-name",
            PROJECT,
            "--file",
            ROOT / "deploy/compose.yaml",
        ]
        return run([program("podman-compose"), *which, *arguments], environment=self._environment, within_s=within_s)

    def container(self, service: str) -> str:
        """The name of the service's container."""
        mine = f"label=com.docker.compose.project={PROJECT}", f"label=com.docker.compose.service={service}"
        filters = [part for each in mine for part in ("--filter", each)]
        names = self.podman("ps", "--all", "--format", "{{.Names}}", *filters).split()
        assert len(names) == 1, f"{service} has the containers {names}"
        return names[0]

    async def ready(self) -> None:
        """Waits until the health check of every process passes; on failure the error has the logs."""
        for service in SERVING:
            container = self.container(service)
            try:
                await eventually(lambda: self.healthy(container), READY_S, every_s=0.5)  # noqa: B023 (called at once)
            except AssertionError as error:
                raise AssertionError(f"{service} is not ready:\n{self.podman.logs(container)}") from error

    def healthy(self, container: str) -> bool:
        """Runs the health check of compose.yaml in the container, once."""
        try:
            self.podman("healthcheck", "run", container)
        except Failed:
            return False
        return True

    def kill9(self, service: str) -> int:
        """Kills the process of the service's container, and returns its pid."""
        return self.podman.kill9(self.container(service))

    def runs_again(self, service: str, old: int) -> bool:
        """Whether the engine has started a process in place of the old one."""
        return self.podman.pid(self.container(service)) not in {0, old}

    def tokens(self) -> dict[str, str]:
        """The tokens that `keys` made, by whose they are."""
        made: dict[str, Any] = json.loads(self.podman("exec", self.container("write"), "cat", "/run/foldline/endpoints.json"))
        return dict(made["tokens"])

    def watch(self) -> None:
        """Starts Prometheus, as the profile `observe` does."""
        self("--profile", "observe", "up", "--detach", "--no-build", "prometheus", within_s=UP_S)

    def asked(self, *paths: str) -> list[Any]:
        """What Prometheus answers at paths of its API, asked from a container beside it. Raises Failed if one is refused."""
        return list(json.loads(self.podman("exec", self.container("write"), "python", "-c", ASKING, *paths)))

    def docker(self, folder: Path) -> dict[str, str]:
        """The variables with which a shell has `docker compose` on this system; its program is made in the folder."""
        script = folder / "docker"
        script.write_text(DOCKER.format(compose=program("podman-compose"), podman=self._engine, project=PROJECT))
        script.chmod(0o755)
        return {**self._environment, "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def interrupt(self, service: str) -> None:
        """Ctrl-C for what runs in the containers of a service."""
        filters = [f"--filter=label=com.docker.compose.{label}" for label in (f"project={PROJECT}", f"service={service}")]
        for name in self.podman("ps", "--format", "{{.Names}}", *filters).split():
            self.podman("kill", "--signal", "INT", name)

    def cli(self, *arguments: str) -> str:
        """What the `foldline` command prints, run in a container of its own as operations.md says."""
        return self("--profile", "tools", "run", "--rm", "--no-deps", "foldline", *arguments)

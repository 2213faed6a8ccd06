"""The manifests of the overlay `single`, played with podman: pods are started, probed and replaced."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import urllib.request
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.bootstrap import SERVICES, with_database
from deploy.engines.child import free_port
from shared.platform.identity import Role
from shared.platform.seal import KEY_BYTES
from shared.platform.tokens import DevelopmentIssuer
from tests.containers.engine import Podman
from tests.containers.images import ROOT, Images
from tests.containers.manifests import Document, Manifests, Template, config_map, manifests, pod, render, text
from tests.support.system.waiting import eventually

OVERLAY = ROOT / "deploy/kubernetes/overlays/single"
NETWORK = "foldline-kube-test"
PREFIX = "foldline-kube"
"""The names of the pods begin with it."""
READY_S = 120.0


class Played:
    """A namespace of a cluster, as far as one engine without a cluster can be one."""

    def __init__(self, podman: Podman, images: Images, folder: Path) -> None:
        """`folder` keeps the keys and what is played."""
        self.podman = podman
        self._folder = folder
        self.issuer = DevelopmentIssuer(folder / "keys")
        names = {"foldline:latest": images.foldline, "postgres:18": images.postgres, "nats:2.12": images.nats}
        self.manifests: Manifests = manifests(render(OVERLAY), names)
        self._given = [*self.manifests.config_maps, *self._make_secrets()]
        # By pod: the component and the published ports.
        self.pods: dict[str, tuple[str, dict[str, int]]] = {}

    def create(self) -> None:
        """Makes the network of the pods, after whatever a killed run left is removed."""
        self.remove()
        self.podman("network", "create", NETWORK)

    def remove(self) -> None:
        """Removes pods, volumes and the network."""
        for name in self.podman("pod", "ls", "--format", "{{.Name}}", "--filter", f"name={PREFIX}").split():
            self.podman("pod", "rm", "--force", "--time", "5", name)
        mine = {each["metadata"]["name"] for each in self._given}
        volumes = [name for name in self.podman("volume", "ls", "--quiet").split() if PREFIX in name or name in mine]
        if volumes:
            self.podman("volume", "rm", "--force", *volumes)
        self.podman("network", "rm", "--force", NETWORK)

    def start(self, component: str, number: int = 1, ports: Mapping[str, int] | None = None) -> str:
        """Plays a pod of the component and returns its name. In the network it answers to the component's name."""
        template = self.manifests.templates[component]
        name = f"{PREFIX}-{component}-{number}"
        published = {port: (ports or {}).get(port) or free_port() for port in template.ports}
        path = self._folder / f"{name}.yaml"
        path.write_text(text([*self._given, *pod(template, name, published)]))
        self.podman("kube", "play", "--network", f"{NETWORK}:alias={component}", path)
        self.pods[name] = (component, published)
        return name

    def stop(self, name: str) -> int:
        """Ends a pod as a cluster does: SIGTERM, SIGKILL after the grace period, and it is deleted. Returns the exit code."""
        component, _ = self.pods[name]
        grace_s = self.manifests.templates[component].spec["terminationGracePeriodSeconds"]
        self.podman("pod", "stop", "--time", str(grace_s), name)
        code = int(self.podman.inspect(self.container(name))["State"]["ExitCode"])
        self.podman("pod", "rm", "--force", name)
        del self.pods[name]
        return code

    def container(self, name: str) -> str:
        """The one container of a pod."""
        component, _ = self.pods[name]
        return f"{name}-{self.manifests.templates[component].spec['containers'][0]['name']}"

    async def ended(self, name: str) -> None:
        """Waits until the pod of a Job has ended with code 0."""

        def over() -> bool:
            state = self.podman.inspect(self.container(name))["State"]
            return str(state["Status"]) == "exited" and state["ExitCode"] == 0

        await self._eventually(name, lambda: asyncio.to_thread(over))

    async def ready(self, name: str) -> None:
        """Waits until the start-up and the readiness probe of the manifest pass."""
        for kind in ("startupProbe", "readinessProbe"):
            await self._eventually(name, lambda: self.probe(name, kind))  # noqa: B023 (called at once)

    async def _eventually(self, name: str, condition: Callable[[], Awaitable[bool]]) -> None:
        try:
            await eventually(condition, READY_S, every_s=0.5)
        except AssertionError as error:
            raise AssertionError(f"{name}:\n{self.podman.logs(self.container(name))}") from error

    async def probe(self, name: str, kind: str) -> bool:
        """Runs a probe of the pod's manifest once, as a kubelet would. One that the manifest lacks passes."""
        component, published = self.pods[name]
        template = self.manifests.templates[component]
        match template.probes.get(kind):
            case {"grpc": {"port": port, "service": service}}:
                return await _answers_grpc(published[_name_of(template, port)], service)
            case {"httpGet": {"port": port, "path": path}}:
                return await asyncio.to_thread(_answers_http, published[port], path)
            case {"tcpSocket": {"port": port}}:
                return await _answers_tcp(published[_name_of(template, port)])
            case _:
                return True

    def token(self, tenant: str, user_id: str, *roles: Role) -> str:
        """A token that the services believe."""
        return self.issuer.issue(tenant=tenant, user_id=user_id, roles=roles)

    def _make_secrets(self) -> list[Document]:
        """What operations.md says that the namespace must have."""
        password = secrets.token_urlsafe(16)
        admin = f"postgresql://postgres:{password}@postgres:5432/postgres"
        databases = {
            f"{service}_{role}": with_database(
                admin, f"foldline_{service}", user=f"foldline_{service}_{role}", password=secrets.token_urlsafe(16)
            )
            for service, roles in SERVICES.items()
            for role in roles
        }
        tokens = {
            "projector": self.token("foldline", "projector", Role.READER),
            "saga": self.token("foldline", "saga", Role.READER, Role.PROCESS),
        }
        return [
            config_map("foldline-issuer", {"jwks.json": self.issuer.jwks_file.read_text()}),
            config_map("foldline-admin", {"url": admin, "password": password}),
            config_map("foldline-databases", databases),
            config_map("foldline-seal", {"keys": secrets.token_hex(KEY_BYTES)}),
            config_map("foldline-tokens", tokens),
        ]


def _name_of(template: Template, port: int) -> str:
    return next(name for name, number in template.ports.items() if number == port)


async def _answers_grpc(port: int, service: str) -> bool:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=3)
        except grpc.aio.AioRpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _answers_http(port: int, path: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=3) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


async def _answers_tcp(port: int) -> bool:
    with contextlib.suppress(OSError):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()
        return True
    return False

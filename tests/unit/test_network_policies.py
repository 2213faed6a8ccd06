"""The network policies of both Kubernetes overlays let through what the processes need, and nothing else.

They are rendered as `make lint` does it, and judged by tests/support/checks/policies.py: no cluster enforces them here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.checks.policies import Pod, may_connect, pods, policies, selectors, selects

KUBERNETES = Path(__file__).parents[2] / "deploy/kubernetes"
PROCESSES = ("write", "relay", "read", "projector", "saga")
MONITORING = Pod("prometheus", {}, "monitoring", {"kubernetes.io/metadata.name": "monitoring"})
DNS = Pod("coredns", {"k8s-app": "kube-dns"}, "kube-system", {"kubernetes.io/metadata.name": "kube-system"})
CALLER = Pod("shop", {}, "shop", {"foldline.dev/caller": "true"})
STRANGER = Pod("shop", {}, "shop", {})
NEIGHBOUR = Pod("neighbour", {"app.kubernetes.io/name": "neighbour"})
OPERATOR = Pod(
    "cnpg", {"app.kubernetes.io/name": "cloudnative-pg"}, "cnpg-system", {"kubernetes.io/metadata.name": "cnpg-system"}
)
# As CloudNativePG and the chart `nats` label their pods.
POSTGRES = Pod("postgres-1", {"cnpg.io/cluster": "postgres", "cnpg.io/podRole": "instance"})
NATS = Pod(
    "nats-0", {"app.kubernetes.io/name": "nats", "app.kubernetes.io/instance": "nats", "app.kubernetes.io/component": "nats"}
)
PUBLIC = Pod("public", address="203.0.113.7")
PRIVATE = Pod("private", address="10.1.2.3")


def render(folder: Path) -> list[dict[str, Any]]:
    """The objects of a kustomization."""
    kubectl = Path(sys.executable).with_name("kubectl")
    done = subprocess.run([kubectl, "kustomize", folder], check=True, capture_output=True)  # noqa: S603 (of ours)
    return list(yaml.load_all(done.stdout, yaml.CSafeLoader))


@pytest.fixture(scope="module")
def overlays() -> dict[str, list[dict[str, Any]]]:
    """The objects of each overlay."""
    return {name: render(KUBERNETES / "overlays" / name) for name in ("single", "production")}


@pytest.fixture(params=["single", "production"])
def known(
    request: pytest.FixtureRequest, overlays: dict[str, list[dict[str, Any]]]
) -> tuple[list[dict[str, Any]], dict[str, Pod]]:
    """An overlay's objects, and its pods with the engines' by name, those of the operator and the chart included."""
    objects = overlays[request.param]
    return objects, {"postgres": POSTGRES, "nats": NATS} | pods(objects)


def test_what_is_selected_is_there(known: tuple[list[dict[str, Any]], dict[str, Pod]]) -> None:
    """Each policy selects a pod that exists, and so does each of its peers; each service has pods and their ports."""
    objects, there = known
    for policy in policies(objects):
        for selector in selectors(policy):
            assert any(selects(selector, pod.labels) for pod in there.values()), (policy["metadata"]["name"], selector)
    for service in (it for it in objects if it["kind"] == "Service"):
        behind = [pod for pod in there.values() if selects({"matchLabels": service["spec"]["selector"]}, pod.labels)]
        assert [pod.name for pod in behind] == [service["metadata"]["name"]]
        for port in service["spec"]["ports"]:
            assert port.get("targetPort", port["name"]) in behind[0].ports


def test_processes_reach_what_their_settings_name(known: tuple[list[dict[str, Any]], dict[str, Pod]]) -> None:
    """The write service, NATS, the databases, the collector and names; the bootstrap reaches the databases."""
    objects, there = known
    rules = policies(objects)
    [told] = [it["data"] for it in objects if it["kind"] == "ConfigMap" and it["metadata"]["name"] == "foldline"]
    named = [told[variable].rpartition("//")[2].rpartition(":") for variable in ("FOLDLINE_WRITE_ADDRESS", "FOLDLINE_NATS_URL")]
    addresses = [(there[host], int(port)) for host, _, port in named] + [(there["postgres"], 5432)]
    for name in PROCESSES:
        for target, port in addresses:
            assert may_connect(rules, there[name], target, port), (name, target.name)
        assert may_connect(rules, there[name], replace(MONITORING, name="collector"), 4317)
        assert may_connect(rules, there[name], DNS, 53, "UDP")
        assert may_connect(rules, MONITORING, there[name], int(told["FOLDLINE_ADMIN_LISTEN"].rpartition(":")[2]))
    assert may_connect(rules, there["bootstrap"], there["postgres"], 5432)
    for name in ("write", "read", "saga"):
        assert may_connect(rules, CALLER, there[name], 50051)


def test_nothing_else_gets_through(known: tuple[list[dict[str, Any]], dict[str, Pod]]) -> None:
    """Neither strangers nor neighbours of the namespace reach engines, nor do strangers reach services; nobody calls outside."""
    objects, there = known
    rules = policies(objects)
    for source in (STRANGER, CALLER, MONITORING, NEIGHBOUR):
        assert not may_connect(rules, source, there["postgres"], 5432)
        assert not may_connect(rules, source, there["nats"], 4222)
    for name in PROCESSES:
        assert not may_connect(rules, STRANGER, there[name], 50051)
        assert not may_connect(rules, CALLER, there[name], 9464)
        assert not may_connect(rules, there[name], PUBLIC, 443)
    assert not may_connect(rules, there["projector"], there["read"], 50051)


def test_production_lets_the_engines_work_together(overlays: dict[str, list[dict[str, Any]]]) -> None:
    """Instances of PostgreSQL replicate, their operator and the API server are reached; servers of NATS make routes."""
    rules = policies(overlays["production"])
    second = replace(POSTGRES, name="postgres-2")
    joining = Pod("postgres-2-join", {"cnpg.io/cluster": "postgres", "cnpg.io/jobRole": "join"})
    for port in (5432, 8000):
        assert may_connect(rules, second, POSTGRES, port)
        assert may_connect(rules, OPERATOR, POSTGRES, port)
    assert may_connect(rules, joining, POSTGRES, 5432)
    assert may_connect(rules, POSTGRES, replace(PRIVATE, name="API server"), 6443)
    assert may_connect(rules, MONITORING, POSTGRES, 9187)
    assert may_connect(rules, NATS, replace(NATS, name="nats-1"), 6222)
    assert not may_connect(rules, STRANGER, POSTGRES, 8000)
    assert not may_connect(rules, NATS, POSTGRES, 5432)


def test_components_let_services_call_outside(tmp_path: Path) -> None:
    """Public addresses over https, for keys, webhooks and object stores; a mail server, for the saga service alone."""
    named = [
        os.path.relpath(KUBERNETES / it, tmp_path.resolve())
        for it in ("overlays/production", "components/https", "components/mail")
    ]
    told = {"resources": named[:1], "components": named[1:], "namespace": "foldline"}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(told))
    objects = render(tmp_path)
    rules, there = policies(objects), pods(objects)
    assert {it["metadata"]["namespace"] for it in rules} == {"foldline"}
    for name in ("write", "read", "saga"):
        assert may_connect(rules, there[name], PUBLIC, 443)
        assert not may_connect(rules, there[name], PRIVATE, 443)
    assert not may_connect(rules, there["relay"], PUBLIC, 443)
    for port in (465, 587):
        assert may_connect(rules, there["saga"], PRIVATE, port)
        assert not may_connect(rules, there["write"], PUBLIC, port)

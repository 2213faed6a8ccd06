"""The manifests of an overlay as pods that podman can play.

Podman knows neither StatefulSets nor Jobs, and gives no two pods of a Deployment different ports of this machine. Each pod here
is the template of its Deployment, StatefulSet or Job, unchanged but for this:

- images are those of the test, and never pulled;
- probes are taken out, and run by the test instead: podman has no gRPC probes and needs systemd for the others;
- ports are published on this machine, where the test's clients are;
- secrets are config maps: podman 4.3 mounts a secret's values undecoded;
- a volume claim names the owner of its volume, which in a cluster `fsGroup` brings about.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from tests.containers.engine import program, run

Document = dict[str, Any]
OWNERS = ("Deployment", "StatefulSet", "Job")


@dataclass(frozen=True, slots=True)
class Template:
    """What the pods of one component are made of."""

    name: str
    kind: str
    spec: Document
    labels: dict[str, str]
    claims: list[Document]
    probes: dict[str, Document]
    """The container's `startupProbe`, `livenessProbe` and `readinessProbe`, as far as it has them."""
    ports: dict[str, int]


@dataclass(frozen=True, slots=True)
class Manifests:
    """An overlay, rendered."""

    templates: dict[str, Template]
    config_maps: list[Document]


def render(overlay: Path) -> list[Document]:
    """The objects that `kubectl apply -k` would send."""
    text = run([program("kubectl"), "kustomize", overlay])
    return [msgspec.yaml.decode(part, type=Document) for part in text.split("\n---\n")]


def manifests(documents: list[Document], images: Mapping[str, str]) -> Manifests:
    """The parts of them that can be played. `images` by the name in the manifests."""
    templates = {
        document["metadata"]["name"]: _template(document, images) for document in documents if document["kind"] in OWNERS
    }
    return Manifests(templates, [document for document in documents if document["kind"] == "ConfigMap"])


def _template(document: Document, images: Mapping[str, str]) -> Template:
    pod = document["spec"]["template"]
    spec: Document = json.loads(json.dumps(pod["spec"]))
    (container,) = spec["containers"]
    kinds = ("startupProbe", "livenessProbe", "readinessProbe")
    probes = {kind: container.pop(kind) for kind in kinds if kind in container}
    container["image"] = images[container["image"]]
    container["imagePullPolicy"] = "Never"
    ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
    claims = document["spec"].get("volumeClaimTemplates", [])
    return Template(document["metadata"]["name"], document["kind"], spec, pod["metadata"]["labels"], claims, probes, ports)


def pod(template: Template, name: str, published: Mapping[str, int]) -> list[Document]:
    """A pod of the component, and its claims. `published`: a port of this machine by the name of the container's port."""
    spec: Document = json.loads(json.dumps(template.spec))
    (container,) = spec["containers"]
    for port in container.get("ports", []):
        if port["name"] in published:
            port.update(hostPort=published[port["name"]], hostIP="127.0.0.1")
    claims = [_claim(each, name, spec["securityContext"]) for each in template.claims]
    for volume in spec.setdefault("volumes", []):
        if "secret" in volume:
            source = volume.pop("secret")
            volume["configMap"] = {**source, "name": source.pop("secretName")}
    spec["volumes"].extend(
        {"name": each["metadata"]["name"], "persistentVolumeClaim": {"claimName": claim["metadata"]["name"]}}
        for each, claim in zip(template.claims, claims, strict=True)
    )
    made = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": template.labels}, "spec": spec}
    return [*claims, made]


def _claim(template: Document, pod_name: str, security: Mapping[str, Any]) -> Document:
    owner = {f"volume.podman.io/{what}": str(security[f"runAs{who}"]) for what, who in (("uid", "User"), ("gid", "Group"))}
    name = f"{template['metadata']['name']}-{pod_name}"
    metadata = {"name": name, "annotations": owner}
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": template["spec"]}


def config_map(name: str, data: Mapping[str, str]) -> Document:
    """A config map."""
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": dict(data)}


def text(documents: list[Document]) -> str:
    """The objects as one file."""
    return "\n---\n".join(json.dumps(document, indent=1) for document in documents) + "\n"

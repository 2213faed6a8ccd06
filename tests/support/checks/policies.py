"""Which pod may connect to which, by the network policies of manifests, for one namespace and who calls it from outside."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any

Object = dict[str, Any]
NAMESPACE = "foldline"
OWNERS = {"Deployment", "StatefulSet", "Job"}


@dataclass(frozen=True)
class Pod:
    """A pod, or with an `address` what is outside of the cluster."""

    name: str
    labels: dict[str, str] = field(default_factory=dict)
    namespace: str = NAMESPACE
    namespace_labels: dict[str, str] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)
    """The named ports of its containers."""
    address: str = ""


def pods(objects: Iterable[Object]) -> dict[str, Pod]:
    """A pod of each Deployment, StatefulSet and Job, by the name of that."""
    found = {}
    for it in objects:
        if it["kind"] in OWNERS:
            template = it["spec"]["template"]
            ports = {
                port["name"]: port["containerPort"] for each in template["spec"]["containers"] for port in each.get("ports", ())
            }
            found[it["metadata"]["name"]] = Pod(it["metadata"]["name"], template["metadata"]["labels"], ports=ports)
    return found


def policies(objects: Iterable[Object]) -> list[Object]:
    """The network policies."""
    return [it for it in objects if it["kind"] == "NetworkPolicy"]


def may_connect(rules: Iterable[Object], source: Pod, target: Pod, port: int, protocol: str = "TCP") -> bool:
    """Whether the policies let `source` out to `target` and let it in there."""
    rules = list(rules)
    out = _lets(rules, source, target, port, protocol, "Egress", "egress", "to")
    return out and _lets(rules, target, source, port, protocol, "Ingress", "ingress", "from")


def selectors(policy: Object) -> Iterator[Object]:
    """What a policy selects pods of its own namespace by."""
    yield policy["spec"]["podSelector"]
    for direction, peers in (("ingress", "from"), ("egress", "to")):
        for rule in policy["spec"].get(direction, ()):
            yield from (
                peer["podSelector"] for peer in rule.get(peers, ()) if "podSelector" in peer and "namespaceSelector" not in peer
            )


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a label selector has these labels."""
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for each in selector.get("matchExpressions", ()):
        assert each["operator"] == "In", "only In is known here"
        if labels.get(each["key"]) not in each["values"]:
            return False
    return True


def _lets(rules: list[Object], pod: Pod, peer: Pod, port: int, protocol: str, kind: str, direction: str, peers: str) -> bool:
    held = [
        it["spec"]
        for it in rules
        if pod.namespace == NAMESPACE
        and not pod.address
        and kind in it["spec"]["policyTypes"]
        and selects(it["spec"]["podSelector"], pod.labels)
    ]
    if not held:  # no policy is for it: all is let through
        return True
    return any(
        _has_port(rule, port, protocol) and (peers not in rule or any(_is_peer(each, peer) for each in rule[peers]))
        for spec in held
        for rule in spec.get(direction, ())
    )


def _has_port(rule: Object, port: int, protocol: str) -> bool:
    return "ports" not in rule or any((each["port"], each["protocol"]) == (port, protocol) for each in rule["ports"])


def _is_peer(told: Object, peer: Pod) -> bool:
    if "ipBlock" in told:
        if not peer.address:
            return False
        block, address = told["ipBlock"], ip_address(peer.address)
        return address in ip_network(block["cidr"]) and not any(address in ip_network(it) for it in block.get("except", ()))
    if peer.address:
        return False
    if "namespaceSelector" in told:
        if not selects(told["namespaceSelector"], peer.namespace_labels):
            return False
    elif peer.namespace != NAMESPACE:
        return False
    return selects(told.get("podSelector", {}), peer.labels)

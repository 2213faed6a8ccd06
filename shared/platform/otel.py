"""What OpenTelemetry's own variables ask of this process, and what the process is for all its telemetry."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import unquote
from uuid import uuid4

SCOPE = "foldline"
EXPORTERS = {"OTEL_TRACES_EXPORTER": ("otlp", "none"), "OTEL_METRICS_EXPORTER": ("otlp", "none", "prometheus")}
"""What may be chosen by OpenTelemetry's variables. Prometheus is answered by the admin port in any case."""
PROTOCOLS = ("OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL")

_INSTANCE = str(uuid4())


def release(home: Path = Path(__file__).parents[2]) -> str:
    """The version of this release: from the file VERSION beside the packages, as in the image, else of the package installed."""
    try:
        return (home / "VERSION").read_text().strip()
    except OSError:  # not the image
        pass
    try:
        return version("foldline")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0"


def resource(service: str) -> dict[str, str]:
    """What this process is, for all its telemetry. OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES override it."""
    attributes = {
        "service.name": service,
        "service.namespace": SCOPE,
        "service.version": release(),
        "service.instance.id": _INSTANCE,
    }
    for pair in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "").split(","):
        key, separator, value = pair.partition("=")
        if separator:
            attributes[key.strip()] = unquote(value.strip())
    if name := os.environ.get("OTEL_SERVICE_NAME"):
        attributes["service.name"] = name
    return attributes


def disabled() -> bool:
    """Whether OTEL_SDK_DISABLED turns traces and the export of metrics off."""
    return os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"


def unsupported() -> list[str]:
    """A sentence for each of OpenTelemetry's variables that asks for an export which this release does not have."""
    if disabled():
        return []
    exporters = [
        f"{name}: must be one of {', '.join(known)}" for name, known in EXPORTERS.items() if not _chosen(name) <= {*known, ""}
    ]
    return exporters + [
        f"{name}: must be grpc, the only protocol that is exported with"
        for name in PROTOCOLS
        if not _chosen(name) <= {"grpc", ""}
    ]


def _chosen(name: str) -> set[str]:
    return {each.strip() for each in os.environ.get(name, "").lower().split(",")}


def exports(signal: str) -> bool:
    """Whether OpenTelemetry's variables ask for an export of `traces` or `metrics` over OTLP.

    Nothing is exported unless an endpoint or an exporter is named: the default of the specification, a collector on
    localhost, would have every process look for one.
    """
    if disabled():
        return False
    chosen = _chosen(f"OTEL_{signal.upper()}_EXPORTER")
    if chosen != {""}:
        return "otlp" in chosen
    return any(os.environ.get(name) for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", f"OTEL_EXPORTER_OTLP_{signal.upper()}_ENDPOINT"))


def run_within(seconds: float, work: Callable[[], None]) -> None:
    """Runs `work` and waits for it so long at the most.

    The SDK's own shutdown blocks for as long as its exporter tries, 4 s and more with a collector that is away: so it has
    a thread of its own, which ends with the process.
    """
    ending = threading.Thread(target=work, name="telemetry-shutdown", daemon=True)
    ending.start()
    ending.join(seconds)

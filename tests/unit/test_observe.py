"""The compose profile `observe` fits together: who sends what to whom, and under which names Grafana finds it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.containers.alert_cases import CASES, FIRES_BY, RULES, firing, series_of, store_of

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SERVICES: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
OBSERVE = {name: service for name, service in SERVICES.items() if service.get("profiles") == ["observe"]}
COLLECTOR: dict[str, Any] = yaml.safe_load((DEPLOY / "observe/collector.yaml").read_text())
DATASOURCES = yaml.safe_load((DEPLOY / "observe/grafana/datasource.yaml").read_text())["datasources"]
DASHBOARD = json.loads((DEPLOY / "observe/dashboard.json").read_text())
PROCESSES = ("write", "relay", "read", "projector", "saga")
# Of OpenTelemetry's core distribution, whose image compose.yaml names.
KNOWN = {"receivers": {"otlp"}, "processors": {"memory_limiter", "batch"}, "exporters": {"otlp", "debug"}}


def mounted(service: str) -> dict[str, Path]:
    """The files of this project that a service is given, by their path in its container."""
    rows = [row.split(":") for row in OBSERVE[service]["volumes"]]
    return {inside: DEPLOY / outside for outside, inside, *_ in rows}


def test_the_profile_has_all_that_is_needed() -> None:
    """Spans, metrics and what shows both, each with a version."""
    assert set(OBSERVE) == {"collector", "traces", "prometheus", "grafana"}
    for service in OBSERVE.values():
        assert not service["image"].rstrip("}").endswith((":latest", "-latest"))
        assert ":" in service["image"].partition(":-")[2]


@pytest.mark.parametrize("service", ["collector", "prometheus", "grafana"])
def test_what_is_mounted_is_there(service: str) -> None:
    """An absent file would be mounted as an empty folder, without a word."""
    assert all(file.is_file() for file in mounted(service).values())


def test_spans_go_from_each_process_over_the_collector_to_what_keeps_them() -> None:
    """By the endpoint that the documents tell, which is where the collector listens, and by nobody's wish without it."""
    _, port = COLLECTOR["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"].split(":")
    command = f"OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:{port} docker compose -f deploy/compose.yaml --profile observe up"
    for file in ("deploy/compose.yaml", "docs/observability.md"):
        assert command in (ROOT / file).read_text()
    for process in PROCESSES:
        environment = SERVICES[process]["environment"]
        assert environment["OTEL_EXPORTER_OTLP_ENDPOINT"] == "${OTEL_EXPORTER_OTLP_ENDPOINT:-}"
        assert environment["OTEL_METRICS_EXPORTER"] == "none"
    assert COLLECTOR["exporters"]["otlp"]["endpoint"] == "traces:4317"
    assert OBSERVE["traces"]["environment"] == {"JAEGER_LISTEN_HOST": "0.0.0.0"}  # noqa: S104 (within compose's network)
    [config] = mounted("collector")
    assert OBSERVE["collector"]["command"] == [f"--config={config}"]


def test_the_collector_is_made_of_what_it_has() -> None:
    """Each component of a pipeline is set up, each that is set up is used, and the image has it."""
    [pipeline] = COLLECTOR["service"]["pipelines"].values()
    for kind, known in KNOWN.items():
        assert set(pipeline[kind]) == set(COLLECTOR[kind]) <= known
    assert set(COLLECTOR) == {*KNOWN, "service"}
    assert pipeline["processors"][0] == "memory_limiter"


def test_prometheus_reads_every_process() -> None:
    """At the admin port that compose gives them, and keeps what leads to traces."""
    config = yaml.safe_load(mounted("prometheus")["/etc/prometheus/prometheus.yml"].read_text())
    [job] = config["scrape_configs"]
    port = SERVICES["write"]["environment"]["FOLDLINE_ADMIN_LISTEN"].rpartition(":")[2]
    targets = {target for group in job["static_configs"] for target in group["targets"]}
    assert targets == {f"{process}:{port}" for process in PROCESSES}
    assert set(config["rule_files"]) <= set(mounted("prometheus"))
    assert "--config.file=/etc/prometheus/prometheus.yml" in OBSERVE["prometheus"]["command"]
    assert "--enable-feature=exemplar-storage" in OBSERVE["prometheus"]["command"]


def test_each_alert_has_a_case_in_which_it_fires() -> None:
    """And fires in it."""
    assert {rule["alert"] for rule in RULES} == set().union(*(fire for _, fire in CASES))


@pytest.mark.parametrize(("otherwise", "fire"), CASES, ids=lambda case: str(case) if isinstance(case, dict) else "")
def test_alerts_fire_on_what_they_are_for(otherwise: dict[str, str], fire: set[str]) -> None:
    """On nothing else, and none on a healthy system. `make test-containers` has Prometheus say the same."""
    assert firing(store_of(series_of(otherwise)), FIRES_BY * 60.0) == fire


def test_grafana_finds_its_data_and_its_dashboard() -> None:
    """Each source is a service of the profile, each panel's source is one of them, and an exemplar leads to the traces."""
    uids = {source["uid"]: source for source in DATASOURCES}
    for source in DATASOURCES:
        assert source["url"].removeprefix("http://").partition(":")[0] in OBSERVE
    for panel in DASHBOARD["panels"]:
        assert uids[panel["datasource"]["uid"]]["type"] == panel["datasource"]["type"]
    [destination] = uids["prometheus"]["jsonData"]["exemplarTraceIdDestinations"]
    assert (destination["name"], uids[destination["datasourceUid"]]["type"]) == ("trace_id", "jaeger")
    assert any(target.get("exemplar") for panel in DASHBOARD["panels"] for target in panel["targets"])
    [provider] = yaml.safe_load((DEPLOY / "observe/grafana/dashboards.yaml").read_text())["providers"]
    shown = [inside for inside in mounted("grafana") if inside.startswith(provider["options"]["path"])]
    assert shown == ["/etc/foldline/dashboards/foldline.json"]


def test_panels_have_ids_and_places_of_their_own() -> None:
    """Grafana shows one of two that share either."""
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(places)

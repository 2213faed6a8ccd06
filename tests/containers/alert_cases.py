"""The alert rules, and made-up numbers for them: those of a healthy system, and for each rule what is otherwise when it fires."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import promql_parser as promql
import yaml

from tests.support.checks.promql import Store

ROOT = Path(__file__).parents[2]
OBSERVE = ROOT / "deploy/observe"
RULES = [rule for group in yaml.safe_load((OBSERVE / "alerts.yaml").read_text())["groups"] for rule in group["rules"]]
PANELS = json.loads((OBSERVE / "dashboard.json").read_text())["panels"]
QUERIES = [*(rule["expr"] for rule in RULES), *(target["expr"] for panel in PANELS for target in panel["targets"])]
"""Of the alert rules, then of the dashboard's panels."""
DAY_S = 86_400
END = 90
"""The numbers come once a minute, for so many minutes."""
FIRES_BY = 30
"""The minute at which every rule has seen enough."""
CONSUMER = 'foldline_consumer="accounts",foldline_shard="1"'
CALLS = "rpc_server_call_duration_seconds_count"
METHOD = 'rpc_method="bank.v1.AccountService/DepositMoney"'
DELAY = "foldline_event_loop_delay_seconds_bucket"
EXPIRY = "foldline_tls_certificate_expiry_timestamp_seconds"


def steady(value: int) -> str:
    """A number that stays, as promtool takes it."""
    return f"{value}+0x{END}"


def grows(each_minute: int) -> str:
    """A counter."""
    return f"0+{each_minute}x{END}"


HEALTHY = {
    'up{job="foldline",instance="write:9464"}': steady(1),
    f"foldline_consumer_goes_on{{{CONSUMER}}}": steady(1),
    f"foldline_consumer_position{{{CONSUMER}}}": steady(50_000),
    f"foldline_consumer_moved_seconds{{{CONSUMER}}}": steady(0),
    f"foldline_consumer_lag_seconds{{{CONSUMER}}}": steady(1),
    'foldline_relay_lag_seconds{foldline_shard="1"}': steady(1),
    'foldline_head{foldline_shard="1"}': steady(50_000),
    'foldline_relay_position{foldline_shard="1"}': steady(50_000),
    'foldline_projection_parked{foldline_consumer="accounts"}': steady(0),
    'foldline_processes{foldline_process_type="transfer",foldline_process_status="running"}': steady(7),
    'foldline_processes{foldline_process_type="transfer",foldline_process_status="parked"}': steady(0),
    "foldline_process_streams_parked": steady(0),
    'foldline_process_overdue_seconds{foldline_process_work="commands"}': steady(1),
    'foldline_process_overdue_seconds{foldline_process_work="timers"}': steady(1),
    'foldline_process_attention{foldline_process_type="transfer"}': steady(0),
    "foldline_deliveries_dead": steady(0),
    "foldline_delivery_waiting_seconds": steady(60),
    "foldline_schedule_overdue_age_seconds": steady(1),
    "foldline_commit_failures_total": steady(3),
    f'{CALLS}{{{METHOD},rpc_response_status_code="OK"}}': grows(600),
    f'{CALLS}{{{METHOD},rpc_response_status_code="INTERNAL"}}': steady(2),
    f'{CALLS}{{{METHOD},rpc_response_status_code="RESOURCE_EXHAUSTED"}}': grows(6),
    f'{DELAY}{{instance="write:9464",le="0.01"}}': grows(60),
    f'{DELAY}{{instance="write:9464",le="0.5"}}': grows(60),
    f'{DELAY}{{instance="write:9464",le="+Inf"}}': grows(60),
    f'{EXPIRY}{{instance="write:9464",foldline_setting="FOLDLINE_TLS_CERT_FILE"}}': steady(30 * DAY_S),
}
NO_SERIES = ""

# What the dashboard shows beside that: made-up numbers of a healthy system.
SHOWN = {
    'foldline_commands_total{outcome="completed"}': grows(600),
    'foldline_commands_total{outcome="rejected"}': grows(6),
    "foldline_events_appended_total": grows(660),
    "foldline_commit_batch_size_sum": grows(600),
    "foldline_commit_batch_size_count": grows(40),
    "foldline_commit_conflicts_total": grows(1),
    'foldline_cache_lookups_total{result="hit"}': grows(500),
    'foldline_cache_lookups_total{result="miss"}': grows(100),
    **{
        f'{metric}_bucket{{le="{end}"}}': grows(count)
        for metric in (
            "rpc_server_call_duration_seconds",
            "foldline_command_queue_wait_seconds",
            "foldline_commit_duration_seconds",
        )
        for end, count in {"0.001": 100, "0.0025": 300, "0.005": 590, "+Inf": 600}.items()
    },
    'process_memory_usage_bytes{instance="write:9464"}': steady(180_000_000),
    'db_client_connection_count{instance="read:9464",db_client_connection_state="idle"}': steady(3),
    'db_client_connection_count{instance="read:9464",db_client_connection_state="used"}': steady(5),
    'db_client_connection_pending_requests{instance="read:9464"}': steady(0),
    'foldline_tenant_commands_waiting{tenant="acme",instance="write:9464"}': steady(2),
    'foldline_tenant_commands_waiting{tenant="acme",instance="write-2:9464"}': steady(3),
}

# What is otherwise: the beginning of a series' name, or all of it, and its numbers. Then the alerts that fire.
CASES: list[tuple[dict[str, str], set[str]]] = [
    ({}, set()),
    ({"up": steady(0)}, {"FoldlineDown"}),
    ({"foldline_consumer_goes_on": steady(0)}, {"FoldlineConsumerStopped"}),
    ({"foldline_consumer_position": steady(39_999), "foldline_consumer_moved": grows(60)}, {"FoldlineConsumerBehind"}),
    ({"foldline_consumer_position": steady(40_000), "foldline_consumer_moved": grows(60)}, set()),
    ({"foldline_consumer_lag": steady(60)}, set()),
    ({"foldline_consumer_lag": steady(61)}, {"FoldlineConsumerBehind"}),
    ({"foldline_relay_lag": steady(61)}, {"FoldlineRelayBehind"}),
    ({"foldline_consumer_position": steady(49_999)}, {"FoldlineConsumerBehind"}),
    ({"foldline_relay_position": steady(39_999)}, {"FoldlineRelayBehind"}),
    ({"foldline_relay_position": NO_SERIES}, {"FoldlineRelayBehind"}),
    ({"foldline_projection_parked": steady(1)}, {"FoldlineParkedRows"}),
    (
        {'foldline_processes{foldline_process_type="transfer",foldline_process_status="parked"}': steady(1)},
        {"FoldlineProcessesParked"},
    ),
    ({"foldline_process_streams_parked": steady(1)}, {"FoldlineProcessesParked"}),
    ({'foldline_process_overdue_seconds{foldline_process_work="commands"}': steady(61)}, {"FoldlineProcessesStuck"}),
    ({'foldline_process_overdue_seconds{foldline_process_work="timers"}': steady(61)}, {"FoldlineProcessesStuck"}),
    ({"foldline_process_attention": steady(1)}, {"FoldlineProcessesAskForAttention"}),
    ({"foldline_deliveries_dead": steady(1)}, {"FoldlineDeliveriesDead"}),
    ({"foldline_delivery_waiting": steady(901)}, {"FoldlineDeliveriesWait"}),
    ({"foldline_schedule_overdue": steady(31)}, {"FoldlineSchedulesLate"}),
    ({"foldline_commit_failures": grows(12)}, {"FoldlineCommitsFail"}),
    ({f'{CALLS}{{{METHOD},rpc_response_status_code="INTERNAL"}}': grows(1)}, {"FoldlineDefects"}),
    ({f'{CALLS}{{{METHOD},rpc_response_status_code="RESOURCE_EXHAUSTED"}}': grows(60)}, {"FoldlineRefusesLoad"}),
    ({f'{DELAY}{{instance="write:9464",le="0.01"}}': grows(50)}, {"FoldlineLoopBlocked"}),
    ({EXPIRY: steady(6 * DAY_S)}, {"FoldlineCertificateEnds"}),
    ({EXPIRY: steady(DAY_S)}, {"FoldlineCertificateEnds", "FoldlineCertificateEndsSoon"}),
]


def series_of(otherwise: Mapping[str, str]) -> dict[str, str]:
    """The series of a case, with their numbers."""
    series = {**HEALTHY, **SHOWN}
    for prefix, values in otherwise.items():
        [changed] = [name for name in HEALTHY if name.startswith(prefix)]
        series[changed] = values
    return {name: values for name, values in series.items() if values}


def store_of(series: Mapping[str, str], every_s: float = 60.0) -> Store:
    """The same series for queries that are evaluated here."""
    store = Store()
    for text, values in series.items():
        selector: Any = promql.parse(text)
        labels = {matcher.name: matcher.value for matcher in selector.matchers.matchers}
        begin, step, times = map(int, re.split("[+x]", values))
        for number in range(times + 1):
            store.add(selector.name, labels, number * every_s, float(begin + step * number))
    return store


def firing(store: Store, at_s: float) -> set[str]:
    """The alerts that fire at a moment: for a series that they have given each minute of the time that they wait."""
    found = set()
    for rule in RULES:
        waits = promql.parse_duration(rule["for"]) // timedelta(minutes=1) if "for" in rule else 0
        series = [set(store.vector(rule["expr"], at_s - 60.0 * minute)) for minute in range(waits + 1)]
        if set.intersection(*series):
            found.add(rule["alert"])
    return found


def case(number: int, otherwise: Mapping[str, str], fire: set[str]) -> dict[str, Any]:
    """A test as promtool takes it."""
    return {
        "name": f"case {number}: {otherwise}",
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series_of(otherwise).items()],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": f"{FIRES_BY}m",
                "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in sorted(fire)],
            }
        ],
    }


def told(queries: Iterable[str]) -> dict[str, Any]:
    """A test, as promtool takes it, that it says of these queries what is said of them here. The system is healthy.

    The numbers come every 15 s, and the moment is none of theirs: what is just a minute old counts for some releases alone.
    """
    series = series_of({})
    store = store_of(series, every_s=15.0)
    return {
        "name": "what queries give",
        "interval": "15s",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": f"round({query}, 0.000001)",  # which takes the names, too, that some series have
                "eval_time": "10m7s",
                "exp_samples": [
                    {
                        "labels": "{" + ",".join(f'{name}="{value}"' for name, value in labels) + "}",
                        "value": math.floor(value * 1e6 + 0.5) / 1e6,
                    }
                    for labels, value in store.vector(query, 607.0).items()
                ],
            }
            for query in queries
        ],
    }

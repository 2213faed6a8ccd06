"""Made-up numbers for the alert rules: those of a healthy system, and for each rule what is otherwise when it fires."""

from __future__ import annotations

from typing import Any

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


def case(number: int, otherwise: dict[str, str], fire: set[str]) -> dict[str, Any]:
    """A test as promtool takes it."""
    series = dict(HEALTHY)
    for prefix, values in otherwise.items():
        [changed] = [name for name in series if name.startswith(prefix)]
        series[changed] = values
    return {
        "name": f"case {number}: {otherwise}",
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items() if values],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": f"{FIRES_BY}m",
                "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in sorted(fire)],
            }
        ],
    }

"""The admin port, as probes, Prometheus and strangers use it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest

from shared.platform.instruments import Histogram
from shared.platform.metrics import Metrics
from shared.platform.settings import CannotStart
from shared.platform.vitals import Vitals
from shared.rpc import admin_port
from shared.rpc.admin_port import AdminPort, host_and_port
from shared.rpc.readiness import Readiness
from tests.support.system.waiting import eventually


@pytest.fixture
async def admin() -> AsyncIterator[AdminPort]:
    """An admin port that listens."""
    metrics = Metrics("test")
    Vitals(metrics)
    port = AdminPort("127.0.0.1:0", Readiness(), metrics.render)
    await port.open()
    yield port
    await port.close()


async def get(admin: AdminPort, path: str, method: str = "GET", **headers: str) -> httpx.Response:
    """The answer of a page."""
    async with httpx.AsyncClient(trust_env=False) as client:
        return await client.request(method, f"http://127.0.0.1:{admin.port}{path}", headers=headers)


async def raw(admin: AdminPort, data: bytes) -> bytes:
    """What comes back for these bytes until the port closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", admin.port)
    writer.write(data)
    answer = await reader.read()
    writer.close()
    return answer


async def test_the_three_pages(admin: AdminPort) -> None:
    """Alive at once, ready when it was asked and all is well; numbers for Prometheus in either of its formats."""
    assert (await get(admin, "/healthz")).status_code == 200
    starting = await get(admin, "/readyz")
    assert (starting.status_code, starting.json()) == (503, {"ready": False, "waits_for": {"start": "it is starting"}})
    await admin._readiness.ask()
    ready = await get(admin, "/readyz?verbose")
    assert (ready.status_code, ready.json()) == (200, {"ready": True, "waits_for": {}})
    plain = await get(admin, "/metrics")
    assert plain.headers["content-type"].startswith("text/plain")
    assert "target_info{" in plain.text
    modern = await get(admin, "/metrics", accept="application/openmetrics-text; version=1.0.0")
    assert modern.headers["content-type"].startswith("application/openmetrics-text")
    assert modern.text.endswith("# EOF\n")


async def test_only_reading_and_only_these_pages(admin: AdminPort) -> None:
    """No other method, no other page; HEAD is GET without the text."""
    assert (await get(admin, "/healthz", "POST")).status_code == 405
    assert (await get(admin, "/metrics/../etc/passwd")).status_code == 404
    assert (await get(admin, "/")).status_code == 404
    head = await get(admin, "/healthz", "HEAD")
    assert (head.status_code, head.text, head.headers["content-length"]) == (200, "", "3")


@pytest.mark.parametrize(
    "data", [b"\r\n\r\n", b"GET /healthz\r\n\r\n", b"\xff\xfe\r\n\r\n", b"GET /healthz HTTP/1.1\r\nx: " + b"y" * 9000]
)
async def test_what_is_no_request_is_refused(admin: AdminPort, data: bytes) -> None:
    """Half a request, bytes of anything, a head without an end."""
    assert (await raw(admin, data)).startswith(b"HTTP/1.1 400 ")
    assert (await get(admin, "/healthz")).status_code == 200


async def test_slow_and_many_clients_are_bounded(admin: AdminPort, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that sends nothing is let go after a while; more than so many are turned away, and make no room."""
    monkeypatch.setattr(admin_port, "CONNECTIONS_MAX", 3)
    monkeypatch.setattr(admin_port, "REQUEST_S", 60)
    silent = [await asyncio.open_connection("127.0.0.1", admin.port) for _ in range(3)]
    await eventually(lambda: len(admin._connections) == 3)
    with pytest.raises(httpx.HTTPError):
        await get(admin, "/healthz")
    for _, writer in silent:
        writer.close()
    await eventually(lambda: not admin._connections)
    monkeypatch.setattr(admin_port, "REQUEST_S", 0.3)
    silent = [await asyncio.open_connection("127.0.0.1", admin.port) for _ in range(3)]
    for reader, writer in silent:
        assert await reader.read() == b""
        writer.close()
    await eventually(lambda: not admin._connections)
    assert (await get(admin, "/healthz")).status_code == 200


async def test_a_page_that_cannot_be_made_is_an_error_and_the_port_goes_on() -> None:
    """And what was raised is not told."""

    async def broken(_: str) -> tuple[str, bytes]:
        raise RuntimeError("secret")

    port = AdminPort("127.0.0.1:0", Readiness(), broken)
    await port.open()
    try:
        answer = await get(port, "/metrics")
        assert (answer.status_code, "secret" in answer.text) == (500, False)
        assert (await get(port, "/healthz")).status_code == 200
    finally:
        await port.close()


async def test_an_address_that_is_taken_or_none() -> None:
    """Both are told at the start."""
    first = AdminPort("127.0.0.1:0", Readiness(), Metrics("test").render)
    port = await first.open()
    try:
        with pytest.raises(CannotStart, match="address already in use"):
            await AdminPort(f"127.0.0.1:{port}", Readiness(), Metrics("test").render).open()
    finally:
        await first.close()
    assert host_and_port("[::1]:9464") == ("::1", 9464)
    for wrong in ("", "9464", "host:", "host:http", "host:70000"):
        with pytest.raises(ValueError, match="not an address"):
            host_and_port(wrong)


async def test_histograms_counters_and_gauges_as_prometheus_reads_them(admin: AdminPort) -> None:
    """Buckets add up, units are in the names, and an example leads to its trace."""
    metrics = Metrics("test")
    waits = Histogram("foldline.waits", "Waits.", unit="s", bounds=(0.1, 1.0), labels=("rpc.method",))
    metrics.add(waits)
    metrics.counter("foldline.things", "Things.", lambda: [(3, {"kind": "a"}), (4, {"kind": "b"})])
    metrics.gauge("foldline.size", "Size.", lambda: [(5, {})], unit="By")
    for value in (0.05, 0.1, 0.5, 7.0):
        waits.observe(value, ("m",))
    waits.observe(0.6, ("m",), traceparent="00-" + "a" * 32 + "-" + "b" * 16 + "-01")
    _, text = await metrics.render("application/openmetrics-text")
    lines = text.decode().splitlines()
    assert 'foldline_waits_seconds_bucket{le="0.1",rpc_method="m"} 2.0' in lines
    [with_example] = [line for line in lines if line.startswith('foldline_waits_seconds_bucket{le="1.0"')]
    assert with_example.startswith('foldline_waits_seconds_bucket{le="1.0",rpc_method="m"} 4.0 # {')
    assert 'trace_id="' + "a" * 32 in with_example
    assert 'foldline_waits_seconds_bucket{le="+Inf",rpc_method="m"} 5.0' in lines
    assert 'foldline_waits_seconds_count{rpc_method="m"} 5.0' in lines
    assert 'foldline_things_total{kind="b"} 4.0' in lines
    assert "foldline_size_bytes 5.0" in lines


async def test_a_caller_cannot_make_a_metric_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a number of series what is counted is counted together."""
    monkeypatch.setattr("shared.platform.instruments.SERIES_MAX", 2)
    waits = Histogram("foldline.waits", "Waits.", unit="s", bounds=(0.1,), labels=("who",))
    for who in "abcd":
        waits.observe(0.05, (who,))
    assert {series: cells[0] for series, cells in waits._series.items()} == {("a",): 1, ("b",): 1, ("overflow",): 2}

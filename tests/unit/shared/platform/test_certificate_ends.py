"""The metric that tells when certificates end."""

from __future__ import annotations

import io
import json
import re
from datetime import timedelta
from pathlib import Path

import pytest

from shared.platform import telemetry
from shared.platform.certificate_ends import watch_certificates
from shared.platform.certificates import end_of
from shared.platform.metrics import Metrics
from shared.platform.settings import CannotStart, ProcessSettings
from tests.support.system.authority import Authority, replace
from tests.support.system.waiting import eventually
from write_service.relay import RelaySettings

LINE = re.compile(r'^foldline_tls_certificate_expiry_timestamp_seconds\{foldline_setting="(\w+)"\} (\S+)$', re.MULTILINE)


async def ends(metrics: Metrics) -> dict[str, float]:
    """What Prometheus would read, by setting."""
    _, page = await metrics.render()
    return {setting: float(value) for setting, value in LINE.findall(page.decode())}


async def test_each_certificate_that_is_used_tells_its_end(tmp_path: Path) -> None:
    """Of the server, and of the clients of NATS and PostgreSQL; authorities are not counted."""
    authority = Authority(tmp_path)
    made = {name: authority.issue(name, begins_in=timedelta(hours=-hours)) for hours, name in enumerate(("a", "b", "c"), 1)}
    url = f"postgresql://u@db/d?sslmode=verify-full&sslrootcert={authority.ca}&sslcert={made['c'].cert}&sslkey={made['c'].key}"
    settings = RelaySettings(  # type: ignore[call-arg]
        tls_cert_file=made["a"].cert,
        tls_key_file=made["a"].key,
        tls_client_ca_file=authority.ca,
        nats_url="tls://nats:4222",  # type: ignore[arg-type]
        nats_cert_file=made["b"].cert,
        nats_key_file=made["b"].key,
        database_url=url,  # type: ignore[arg-type]
    )
    metrics = Metrics("test")
    watch_certificates(metrics, settings)
    told = await ends(metrics)
    assert told == {
        "FOLDLINE_TLS_CERT_FILE": end_of(made["a"].cert).timestamp(),
        "FOLDLINE_NATS_CERT_FILE": end_of(made["b"].cert).timestamp(),
        "FOLDLINE_DATABASE_URL": end_of(made["c"].cert).timestamp(),
    }
    assert len(set(told.values())) == 3


async def test_it_follows_the_certificate_in_use(tmp_path: Path) -> None:
    """A renewed one counts; a file that cannot be used does not, since the one before it is still shown."""
    authority = Authority(tmp_path)
    files = authority.issue()
    metrics = Metrics("test")
    watch_certificates(metrics, ProcessSettings(tls_cert_file=files.cert, tls_key_file=files.key))
    [before] = (await ends(metrics)).values()
    authority.issue(begins_in=timedelta(minutes=-5))
    renewed = end_of(files.cert).timestamp()
    assert renewed != before

    async def told() -> bool:
        return await ends(metrics) == {"FOLDLINE_TLS_CERT_FILE": renewed}

    await eventually(told, 10)
    replace(files.cert, b"nonsense")
    assert await told()


async def test_a_renewal_that_is_not_taken_over_does_not_count(tmp_path: Path) -> None:
    """A good certificate is not in use while the authorities beside it cannot be read; metric and log say so."""
    log = io.BytesIO()
    telemetry.configure("info", service="test", stream=log)
    authority = Authority(tmp_path)
    files = authority.issue()
    metrics = Metrics("test")
    settings = ProcessSettings(tls_cert_file=files.cert, tls_key_file=files.key, tls_client_ca_file=authority.ca)
    watch_certificates(metrics, settings)
    before = await ends(metrics)
    good = authority.ca.read_bytes()
    replace(authority.ca, b"nonsense")
    authority.issue(begins_in=timedelta(minutes=-5))

    async def held_back() -> bool:
        assert await ends(metrics) == before
        return b"certificates_not_reloaded" in log.getvalue()

    await eventually(held_back, 10)
    assert f"{authority.ca} holds no certificate" in log.getvalue().decode()
    replace(authority.ca, good)

    async def taken_over() -> bool:
        return await ends(metrics) == {"FOLDLINE_TLS_CERT_FILE": end_of(files.cert).timestamp()} != before

    await eventually(taken_over, 10)


async def test_the_log_says_why_a_database_certificate_is_not_the_new_one(tmp_path: Path) -> None:
    """By the name of the setting. The database's client reads the file by itself, so nothing else of the process would say so."""
    log = io.BytesIO()
    telemetry.configure("info", service="test", stream=log)
    files = Authority(tmp_path).issue()
    url = f"postgresql://u:swordfish@db/d?sslcert={files.cert}&sslkey={files.key}"
    metrics = Metrics("test")
    watch_certificates(metrics, RelaySettings(nats_url="nats://nats:4222", database_url=url))  # type: ignore[call-arg, arg-type]
    replace(files.cert, b"nonsense")

    async def told() -> bool:
        await ends(metrics)
        return b"certificates_not_reloaded" in log.getvalue()

    await eventually(told, 10)
    # Libraries may log, too: what tests before this one in the process left behind.
    lines = [json.loads(each) for each in log.getvalue().splitlines()]
    [line] = [line for line in lines if line["event"] == "certificates_not_reloaded"]
    assert line["what"] == "FOLDLINE_DATABASE_URL"
    assert line["error"] == f"{files.cert} holds no certificate in PEM form"


async def test_without_certificates_there_is_nothing_to_tell() -> None:
    """Plain text has no end."""
    metrics = Metrics("test")
    watch_certificates(metrics, ProcessSettings())
    assert await ends(metrics) == {}


def test_a_certificate_that_cannot_be_read_is_a_reason_not_to_start(tmp_path: Path) -> None:
    """By the name of its setting, without the URL."""
    url = f"postgresql://u:swordfish@db/d?sslcert={tmp_path}/none.pem"
    settings = RelaySettings(nats_url="nats://nats:4222", database_url=url)  # type: ignore[call-arg, arg-type]
    with pytest.raises(CannotStart, match=r"FOLDLINE_DATABASE_URL: .*none\.pem cannot be read: No such file") as caught:
        watch_certificates(Metrics("test"), settings)
    assert "swordfish" not in str(caught.value)

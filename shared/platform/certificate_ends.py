"""When the certificates of a process end, as a metric: a renewal that did not come is seen days before calls fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial

from shared.platform.certificates import Reloaded, TlsFiles, end_of
from shared.platform.instruments import Labels
from shared.platform.metrics import Metrics
from shared.platform.peers import BrokerPeer, PerhapsWriteServicePeer
from shared.platform.settings import CannotStart, ProcessSettings
from shared.platform.unknown import PREFIX
from shared.platform.urls import client_certificate

METRIC = "foldline.tls.certificate.expiry.timestamp"


def watch_certificates(metrics: Metrics, settings: ProcessSettings) -> None:
    """Adds the end of each certificate that the settings name, by the setting: for servers and clients, and for databases.

    It is that of the certificate in use: a newer file counts as soon as it can be used. Raises CannotStart for one that cannot.
    """
    ends = [*_of_tls(settings), *_of_databases(settings)]

    def read() -> list[tuple[float, Labels]]:
        return [(end(), {"foldline.setting": setting}) for setting, end in ends]

    metrics.gauge(METRIC, "When the certificate that a setting names ends, in seconds since 1970.", read, unit="s")


def _of_tls(settings: ProcessSettings) -> Iterator[tuple[str, Callable[[], float]]]:
    """By the setting: what tells the end of the certificate that the process shows others."""
    sides = {"tls_cert_file": settings.server_tls}
    if isinstance(settings, PerhapsWriteServicePeer):
        sides["client_cert_file"] = settings.write_tls
    if isinstance(settings, BrokerPeer):
        sides["nats_cert_file"] = settings.nats_tls
    for name, files in sides.items():
        if files.cert_file is not None:
            yield _setting(name), partial(_end_of_pair, files)


def _of_databases(settings: ProcessSettings) -> Iterator[tuple[str, Callable[[], float]]]:
    """The same for the certificates that URLs of databases name. The database's client reads them by itself for a connection."""
    for name in type(settings).model_fields:
        if name.endswith("database_url") and (file := client_certificate(getattr(settings, name).get_secret_value())) is not None:
            try:
                ends_at = Reloaded(_setting(name), (file,), partial(end_of, file))
            except ValueError as error:
                raise CannotStart(f"{_setting(name)}: {error}") from None
            yield _setting(name), partial(_end_of, ends_at)


def _end_of_pair(files: TlsFiles) -> float:
    pair = files.current().pair
    assert pair is not None
    return pair.ends_at.timestamp()


def _end_of(ends_at: Reloaded[datetime]) -> float:
    return ends_at.current().timestamp()


def _setting(name: str) -> str:
    return f"{PREFIX}{name.upper()}"

"""When the certificates of a process end, as a metric: a renewal that did not come is seen days before calls fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from shared.platform.certificates import Reloaded, end_of, read_pair
from shared.platform.instruments import Labels
from shared.platform.metrics import Metrics
from shared.platform.settings import PREFIX, CannotStart, ProcessSettings
from shared.platform.urls import client_certificate

METRIC = "foldline.tls.certificate.expiry.timestamp"


def watch_certificates(metrics: Metrics, settings: ProcessSettings) -> None:
    """Adds the end of each certificate that the settings name, by the setting: for servers and clients, and for databases.

    It is that of the certificate in use: a newer file counts as soon as it can be used. Raises CannotStart for one that cannot.
    """
    ends: list[tuple[str, Reloaded[float]]] = []
    for setting, files, end_in in _certificates(settings):
        try:
            ends.append((setting, Reloaded(setting, files, end_in, quiet=True)))
        except ValueError as error:
            raise CannotStart(f"{setting}: {error}") from None

    def read() -> list[tuple[float, Labels]]:
        for _, end in ends:
            end.refresh()
        return [(end.content, {"foldline.setting": setting}) for setting, end in ends]

    metrics.gauge(METRIC, "When the certificate that a setting names ends, in seconds since 1970.", read, unit="s")


def _certificates(settings: ProcessSettings) -> Iterator[tuple[str, tuple[Path, ...], Callable[[], float]]]:
    """The settings that name a certificate, with the files and what reads its end from them."""
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if name.endswith("_cert_file") and value is not None:
            files = (value, getattr(settings, name.replace("_cert_file", "_key_file")))
            yield _setting(name), files, partial(_end_of_pair, *files)
        elif name.endswith("database_url") and (file := client_certificate(value.get_secret_value())) is not None:
            yield _setting(name), (file,), partial(_end_of, file)


def _end_of_pair(chain: Path, key: Path) -> float:
    return read_pair(chain, key).ends_at.timestamp()


def _end_of(chain: Path) -> float:
    return end_of(chain).timestamp()


def _setting(name: str) -> str:
    return f"{PREFIX}{name.upper()}"

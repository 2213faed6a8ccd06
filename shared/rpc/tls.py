"""TLS of our servers: the certificate is read again when its files change.

A new certificate is used for new connections; those that stand are not touched.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import cast

import grpc
from grpc import aio

from shared.platform.certificates import Reloaded, read_authorities, read_pair
from shared.platform.settings import CannotStart, ProcessSettings
from shared.platform.telemetry import logger

log = logger(__name__)


class ServerTls:
    """The certificate of a server, and the authorities whose clients it takes."""

    def __init__(self, cert_file: Path, key_file: Path, client_ca_file: Path | None = None) -> None:
        """With `client_ca_file` only clients with a certificate of one of its authorities may connect.

        Raises ValueError for files that cannot be used.
        """
        self._cert_file, self._key_file, self._client_ca_file = cert_file, key_file, client_ca_file
        self._ends_at: datetime
        self._files = Reloaded("server", (cert_file, key_file, client_ca_file), self._read)
        self._lock = threading.Lock()

    @property
    def ends_at(self) -> datetime:
        """The end of the certificate's validity."""
        return self._ends_at

    def credentials(self) -> grpc.ServerCredentials:
        """What gRPC takes. Before each handshake gRPC asks for a change, on threads of its own."""
        changed = cast("Callable[[], grpc.ServerCertificateConfiguration]", self._changed)  # it may return None: no change
        return grpc.dynamic_ssl_server_credentials(self._files.content, changed, self._client_ca_file is not None)

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        with self._lock:
            return self._files.content if self._files.refresh() else None

    def _read(self) -> grpc.ServerCertificateConfiguration:
        pair = read_pair(self._cert_file, self._key_file)
        authorities = None if self._client_ca_file is None else read_authorities(self._client_ca_file)
        self._ends_at = pair.ends_at
        return grpc.ssl_server_certificate_configuration([(pair.key, pair.chain)], authorities)


def listen(server: aio.Server, settings: ProcessSettings) -> int:
    """Opens the port of `settings.listen`, over TLS if there is a certificate; returns its number.

    Raises CannotStart for a certificate that cannot be used, or an address that is taken or not this machine's.
    """
    if settings.tls_cert_file is None or settings.tls_key_file is None:
        if not settings.listens_locally:
            log.warning("listening_in_plain_text", address=settings.listen)
        return _opened(server.add_insecure_port, settings.listen)
    try:
        tls = ServerTls(settings.tls_cert_file, settings.tls_key_file, settings.tls_client_ca_file)
    except ValueError as error:
        raise CannotStart(str(error)) from None
    log.info("listening_over_tls", address=settings.listen, certificate_ends_at=tls.ends_at.isoformat())
    return _opened(lambda address: server.add_secure_port(address, tls.credentials()), settings.listen)


def _opened(add_port: Callable[[str], int], address: str) -> int:
    try:
        return add_port(address)
    except RuntimeError:
        raise CannotStart(f"FOLDLINE_LISTEN: {address} cannot be listened on: it is taken, or not this machine's") from None

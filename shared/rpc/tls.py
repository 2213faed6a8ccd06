"""TLS of our servers: the certificate is read again when its files change.

A new certificate is used for new connections; those that stand are not touched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import grpc
from grpc import aio

from shared.platform.certificates import Pair, TlsFiles
from shared.platform.settings import CannotStart, ProcessSettings
from shared.platform.telemetry import logger

log = logger(__name__)


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """What gRPC takes to serve the certificate of the files, the newest at each handshake.

    If the files have authorities, only clients with a certificate of one of these may connect.
    """
    used = files.current()

    def configuration() -> grpc.ServerCertificateConfiguration:
        pair = cast("Pair", used.pair)
        return grpc.ssl_server_certificate_configuration([(pair.key, pair.chain)], used.authorities)

    def changed() -> grpc.ServerCertificateConfiguration | None:
        """What to serve instead, if anything. It is asked before each handshake, on threads of gRPC."""
        nonlocal used
        if (now := files.current()) is used:
            return None
        used = now
        return configuration()

    # `changed` may return None, for no change, which the types do not say.
    asked = cast("Callable[[], grpc.ServerCertificateConfiguration]", changed)
    return grpc.dynamic_ssl_server_credentials(configuration(), asked, files.ca_file is not None)


def listen(server: aio.Server, settings: ProcessSettings) -> int:
    """Opens the port of `settings.listen`, over TLS if there is a certificate; returns its number.

    Raises CannotStart for an address that is taken or not this machine's.
    """
    files = settings.server_tls
    if (pair := files.current().pair) is None:
        if not settings.listens_locally:
            log.warning("listening_in_plain_text", address=settings.listen)
        return _opened(server.add_insecure_port, settings.listen)
    log.info("listening_over_tls", address=settings.listen, certificate_ends_at=pair.ends_at.isoformat())
    return _opened(lambda address: server.add_secure_port(address, server_credentials(files)), settings.listen)


def _opened(add_port: Callable[[str], int], address: str) -> int:
    try:
        return add_port(address)
    except RuntimeError:
        raise CannotStart(f"FOLDLINE_LISTEN: {address} cannot be listened on: it is taken, or not this machine's") from None

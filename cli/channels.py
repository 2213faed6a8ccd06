"""Channels of the command line. This module imports gRPC, so commands import it only when they make a call."""

from __future__ import annotations

import os
from pathlib import Path

from grpc import aio

from cli.endpoints import UsageError
from shared.platform.certificates import TlsFiles
from shared.rpc import client


def channel(address: str, *, retries: bool = True) -> aio.Channel:
    """A channel to a service, over TLS if the address begins with grpcs://.

    FOLDLINE_CA_FILE has the authorities of the service's certificate; FOLDLINE_CLIENT_CERT_FILE and FOLDLINE_CLIENT_KEY_FILE
    are for a service that asks for a certificate. Raises UsageError for files that cannot be used.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    named = (os.environ.get(f"FOLDLINE_{name}_FILE") for name in ("CA", "CLIENT_CERT", "CLIENT_KEY"))
    try:
        return client.channel(address, retries=retries, tls=TlsFiles(*(Path(file) if file else None for file in named)))
    except ValueError as error:
        raise UsageError(str(error)) from None

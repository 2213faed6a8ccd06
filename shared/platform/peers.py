"""What a process is told of the peers that it calls: the write service and NATS."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from pydantic import model_validator

from shared.platform.certificates import TlsFiles
from shared.platform.settings import ProcessSettings, refuse_unusable
from shared.platform.urls import TLS_SCHEME, NatsUrl, PerhapsServiceAddress, ServiceAddress, nats_is_verified


class PerhapsWriteServicePeer(ProcessSettings):
    """The way to the write service, for a process that does without it as well."""

    write_address: PerhapsServiceAddress = None
    """The write service's address, host:port, or grpcs://host:port for TLS: there events of the past are read. Without it
    questions about the past are refused."""
    ca_file: Path | None = None
    """The authorities of the write service's certificate, as PEM; without it the usual public ones. Certificates and keys are
    read again when they change."""
    client_cert_file: Path | None = None
    """The certificate that this process shows the write service, as PEM, for a write service that asks for one."""
    client_key_file: Path | None = None
    """Its private key."""

    @cached_property
    def write_tls(self) -> TlsFiles:
        """The certificates for the write service."""
        return TlsFiles(self.ca_file, self.client_cert_file, self.client_key_file)

    @model_validator(mode="after")
    def _write_tls_agrees(self) -> PerhapsWriteServicePeer:
        refuse_unusable(self, "client_cert_file", "client_key_file", "ca_file")
        if self.write_tls.files and not (self.write_address or "").startswith(TLS_SCHEME):
            raise ValueError(f"FOLDLINE_CA_FILE and FOLDLINE_CLIENT_CERT_FILE need FOLDLINE_WRITE_ADDRESS={TLS_SCHEME}...")
        return self


class WriteServicePeer(PerhapsWriteServicePeer):
    """The way to the write service."""

    write_address: ServiceAddress
    """The write service's address, host:port, or grpcs://host:port for TLS: there events are read."""


class BrokerPeer(ProcessSettings):
    """The way to NATS."""

    nats_url: NatsUrl
    """The NATS servers, nats://user:password@host:port, or tls:// in place of nats://; several separated by commas."""
    nats_ca_file: Path | None = None
    """The authorities of the NATS servers' certificates, as PEM; without it the usual public ones. Certificates and credentials
    are read again when the connection is made anew."""
    nats_cert_file: Path | None = None
    """The certificate that this process shows NATS, as PEM."""
    nats_key_file: Path | None = None
    """Its private key."""
    nats_credentials_file: Path | None = None
    """The credentials of a NATS user, a JWT and its key in one file, in place of user and password in the URL."""

    @cached_property
    def nats_tls(self) -> TlsFiles:
        """The certificates for NATS."""
        return TlsFiles(self.nats_ca_file, self.nats_cert_file, self.nats_key_file, what="nats")

    @model_validator(mode="after")
    def _nats_tls_agrees(self) -> BrokerPeer:
        refuse_unusable(self, "nats_cert_file", "nats_key_file", "nats_ca_file")
        if self.nats_tls.files and not nats_is_verified(self.nats_url.get_secret_value()):
            raise ValueError("FOLDLINE_NATS_CA_FILE and FOLDLINE_NATS_CERT_FILE need tls:// in FOLDLINE_NATS_URL")
        return self

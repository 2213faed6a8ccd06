"""Certificates in PEM files: looked at before they are used, and read again when they change.

What is wrong is told with the file's name, in one sentence, and never with what is in a key's file.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from shared.platform.telemetry import logger

if TYPE_CHECKING:  # imported when there is a certificate to read
    from cryptography.x509 import Certificate

LOOK_S = 1.0
_SIZE_MAX = 1024 * 1024

log = logger(__name__)

ContentT = TypeVar("ContentT")


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate with its chain, and its private key, as PEM. `ends_at` is the end of the certificate's validity."""

    chain: bytes
    key: bytes
    ends_at: datetime


def read_pair(chain_file: Path, key_file: Path, *, now: datetime | None = None) -> Pair:
    """The certificate of `chain_file`, which comes first there, with the private key of `key_file`, which has no passphrase.

    Raises ValueError if one cannot be read, the key is another certificate's, or the certificate is not valid at `now`.
    """
    from cryptography.hazmat.primitives.serialization import (  # noqa: PLC0415
        Encoding,
        PublicFormat,
        load_pem_private_key,
    )

    chain, key = _read(chain_file), _read(key_file)
    certificate = _certificates(chain_file, chain)[0]
    try:
        public = load_pem_private_key(key, password=None).public_key()
    except (ValueError, TypeError):
        raise ValueError(f"{key_file} holds no private key in PEM form that needs no passphrase") from None
    told = [each.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) for each in (public, certificate.public_key())]
    if told[0] != told[1]:
        raise ValueError(f"the key in {key_file} is not that of the certificate in {chain_file}")
    now = now or datetime.now(UTC)
    begins_at, ends_at = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < begins_at:
        raise ValueError(f"the certificate in {chain_file} is not valid before {begins_at:%Y-%m-%d %H:%M} UTC")
    if now > ends_at:
        raise ValueError(f"the certificate in {chain_file} expired at {ends_at:%Y-%m-%d %H:%M} UTC")
    return Pair(chain, key, ends_at)


def end_of(chain_file: Path) -> datetime:
    """The end of the validity of a file's first certificate. Raises ValueError if there is none in it."""
    return _certificates(chain_file, _read(chain_file))[0].not_valid_after_utc


def read_authorities(file: Path) -> bytes:
    """The certificates of the authorities in a file, as PEM. Raises ValueError if there is none in it."""
    content = _read(file)
    _certificates(file, content)
    return content


class Reloaded(Generic[ContentT]):
    """What is read from some files; it is read again when one of them changes. Any number of users, on any threads, share one."""

    def __init__(
        self,
        what: str,
        files: Iterable[Path | None],
        read: Callable[[], ContentT],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises what `read` raises. `what` names it in the log; files that are None are none."""
        self._what = what
        self.files = tuple(file for file in files if file is not None)
        self._read = read
        self._clock = clock
        self._lock = threading.Lock()
        self._looked_at = clock()
        self._stamps = self._told = self._look()
        self._content = read()

    def current(self) -> ContentT:
        """The newest content that could be used: the same object until there is another. It looks at the files once a second.

        If they cannot be read, or do not fit each other yet, the last good content stays, the log says so once, and they are
        read again at the next look.
        """
        with self._lock:
            now = self._clock()
            if now - self._looked_at >= LOOK_S:
                self._looked_at = now
                self._refresh()
            return self._content

    def _refresh(self) -> None:
        stamps = self._look()
        if stamps == self._stamps:
            return
        try:
            self._content = self._read()
        except ValueError as error:
            if stamps != self._told:
                log.warning("certificates_not_reloaded", what=self._what, error=str(error))
            self._told = stamps
            return
        self._stamps = self._told = stamps
        log.info("certificates_reloaded", what=self._what)

    def _look(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(_stamp(file) for file in self.files)


@dataclass(frozen=True, slots=True)
class Tls:
    """What one side of TLS needs: the authorities of the other side's certificate, as PEM, and its own certificate with its key.

    A client without `authorities` trusts the usual public ones; a server without them asks for no certificate.
    """

    authorities: bytes | None
    pair: Pair | None


class TlsFiles(Reloaded[Tls]):
    """The files of one side of TLS. Whoever uses the certificate asks for it here, and so does the metric of its end."""

    def __init__(
        self, ca_file: Path | None = None, cert_file: Path | None = None, key_file: Path | None = None, *, what: str = "client"
    ) -> None:
        """`what` names them in the log. Raises ValueError for files that cannot be used."""
        self.ca_file, self.cert_file, self.key_file = ca_file, cert_file, key_file
        super().__init__(what, (ca_file, cert_file, key_file), self._read_all)

    def _read_all(self) -> Tls:
        authorities = None if self.ca_file is None else read_authorities(self.ca_file)
        if self.cert_file is None or self.key_file is None:
            return Tls(authorities, None)
        return Tls(authorities, read_pair(self.cert_file, self.key_file))


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


def _read(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            content = opened.read(_SIZE_MAX + 1)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    if len(content) > _SIZE_MAX:
        raise ValueError(f"{file} is larger than {_SIZE_MAX} bytes")
    return content


def _certificates(file: Path, content: bytes) -> list[Certificate]:
    from cryptography.x509 import load_pem_x509_certificates  # noqa: PLC0415

    try:
        return load_pem_x509_certificates(content)
    except ValueError:
        raise ValueError(f"{file} holds no certificate in PEM form") from None

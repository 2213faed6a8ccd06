"""Certificates for tests, by authorities of their own."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme


@dataclass(frozen=True, slots=True)
class Files:
    """A certificate and its key."""

    cert: Path
    key: Path


class Authority:
    """Issues certificates into files of a folder. `ca` is the file with its own."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self.folder = folder / name
        self.folder.mkdir(parents=True)
        self._ca = trustme.CA()
        self.ca = self.folder / "ca.pem"
        self._ca.cert_pem.write_to_path(self.ca)

    def issue(self, name: str = "server", host: str = "localhost", *, begins_in: timedelta = timedelta(days=-1)) -> Files:
        """A certificate for the host, valid for two days; issued again, it replaces the files, each at once."""
        begins_at = datetime.now(UTC) + begins_in
        made = self._ca.issue_cert(host, not_before=begins_at, not_after=begins_at + timedelta(days=2))
        files = Files(self.folder / f"{name}.pem", self.folder / f"{name}.key")
        replace(files.key, made.private_key_pem.bytes())
        replace(files.cert, b"".join(each.bytes() for each in made.cert_chain_pems))
        return files


def replace(file: Path, content: bytes) -> None:
    """Puts a file in the place of another, at once, as certificates are renewed."""
    fresh = file.with_suffix(".new")
    fresh.write_bytes(content)
    fresh.chmod(0o600)
    os.replace(fresh, file)

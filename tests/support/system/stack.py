"""The running processes, for tests of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from deploy.bootstrap import Databases
from deploy.engines.nats import Nats
from deploy.engines.postgres import Postgres
from deploy.local.system import System
from tests.support.system.mail import Mailbox


class Stack(System):
    """The system as `foldline dev` runs it, and its engines. A program that dies is not started again."""

    def __init__(
        self,
        folder: Path,
        databases: Databases,
        postgres: Postgres,
        nats: Nats,
        mail: Mailbox,
        *,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """`settings` go to every process."""
        super().__init__(folder, databases, nats.url, settings=settings, smtp_url=mail.url)
        self.postgres = postgres
        self.nats = nats
        self.mail = mail

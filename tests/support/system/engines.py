"""PostgreSQL and NATS for tests, and databases cloned from a migrated template in a few milliseconds."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import psycopg
from psycopg import sql

from deploy.bootstrap import Database, Databases, bootstrap, let_in, with_database
from deploy.engines.nats import Nats
from deploy.engines.postgres import Postgres

PREFIX = "foldline"


class Engines:
    """The two engines in a folder of their own, and what was bootstrapped on them."""

    def __init__(self, folder: Path, *, settings: Mapping[str, str] | None = None) -> None:
        """`settings` are PostgreSQL's."""
        self.postgres = Postgres(folder / "postgres", settings=settings, sync_new=False)
        self.nats = Nats(folder / "nats")
        self._numbers = itertools.count(1)
        self._templates: Databases | None = None

    @property
    def admin_url(self) -> str:
        """The administrator's URL of PostgreSQL."""
        return self.postgres.url

    @property
    def nats_url(self) -> str:
        """The URL of NATS."""
        return self.nats.url

    def start(self) -> None:
        """Starts both, or whichever is down."""
        if not self.nats.running:
            self.nats.start()
        if not self.postgres.running:
            self.postgres.start()

    def stop(self) -> None:
        """Stops both and deletes their data."""
        self.nats.destroy()
        self.postgres.destroy()

    @property
    def templates(self) -> Databases:
        """The migrated databases that tests get clones of. Nobody may be connected to them."""
        if self._templates is None:
            self._templates = bootstrap(self.admin_url, PREFIX)
        return self._templates

    def databases(self) -> Databases:
        """Fresh databases of all services."""
        return replace(self.templates, write=self.clone("write"), read=self.clone("read"), saga=self.clone("saga"))

    def clone(self, service: str) -> Database:
        """A fresh database of a service, with the tables and rights of the real one. The roles are the same for all."""
        template: Database = getattr(self.templates, service)
        name = f"{template.name}_{next(self._numbers)}"
        with psycopg.connect(self.admin_url, autocommit=True) as admin:
            create = sql.SQL("CREATE DATABASE {} TEMPLATE {} OWNER {} STRATEGY wal_log")
            names = (name, template.name, f"{template.name}_owner")
            admin.execute(create.format(*(sql.Identifier(each) for each in names)))
            let_in(admin, name, service, PREFIX)
        return Database(
            name=name,
            admin=with_database(template.admin, name),
            owner=with_database(template.owner, name),
            app=with_database(template.app, name),
            query=None if template.query is None else with_database(template.query, name),
        )

    def drop(self, database: Database) -> None:
        """Deletes a clone, whoever is connected."""
        with psycopg.connect(self.admin_url, autocommit=True) as admin:
            admin.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(database.name)))

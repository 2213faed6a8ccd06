"""Makes the databases, roles and tables of Foldline, with an administrator's URL. It may be repeated, and two may run at once.

Each service has an owner role, which owns the database and runs the migrations; a role `app`; and a role `query` for reading
under row-level security. The services get only the URLs of `app` and `query`. Roles belong to the whole server, so their names
begin with the prefix.

`python -m deploy.bootstrap` takes DATABASE_URL and prints the URLs as JSON, or keeps them in files.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import psycopg
from psycopg import sql

from shared.platform.migrate import migrate, refuse_newer
from shared.platform.postgres import SETTINGS, UnsafeDatabase
from shared.platform.unknown import unknown_variables
from shared.platform.urls import refuse_admin_url
from shared.platform.versions import postgres_too_old

ROOT = Path(__file__).resolve().parent.parent
SERVICES = {"write": ("owner", "app"), "read": ("owner", "app", "query"), "saga": ("owner", "app")}
# A transaction that waits for its client holds locks, in the write database the shard's: 3 s is longer than any of ours.
IDLE_IN_TRANSACTION = "3s"
# A consumer that is frozen between two statements of a pipeline is not idle to the server, which waits for the rest of
# it: only the age of the transaction tells. Ours take milliseconds.
CONSUMERS_TRANSACTION = "4s"
ASK_AGAIN_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Database:
    """One service's database and the URLs to it. `query` is None where there is no such role."""

    name: str
    admin: str
    owner: str
    app: str
    query: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Databases:
    """The result of a bootstrap. `passwords` by role name: if they are given to the next run, the URLs stay the same."""

    write: Database
    read: Database
    saga: Database
    passwords: Mapping[str, str]


def with_database(url: str, database: str, *, user: str | None = None, password: str | None = None) -> str:
    """The URL with another database, and another user if given."""
    parts = urlsplit(url)
    place = parts.netloc.rpartition("@")[2]
    who = parts.netloc.rpartition("@")[0]
    if user is not None:
        who = f"{quote(user, safe='')}:{quote(password or '', safe='')}"
    return urlunsplit(parts._replace(netloc=f"{who}@{place}" if who else place, path=f"/{quote(database, safe='')}"))


def bootstrap(admin_url: str, prefix: str = "foldline", *, passwords: Mapping[str, str] | None = None) -> Databases:
    """Makes what is missing and migrates each database; returns the URLs.

    The administrator needs CREATEDB and CREATEROLE, not superuser. A role whose password is not in `passwords` gets a
    new one, which shuts out whoever knows only the old. Raises ValueError if `prefix` is no plain name, and, before anything is
    made or changed, UnsafeDatabase if the server is too old, SchemaTooNew if a newer release has migrated one of the databases.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", prefix):
        raise ValueError(f"the prefix {prefix!r} is no plain name of at most 40 characters")
    known = dict(passwords or {})
    with psycopg.connect(admin_url, autocommit=True) as admin:
        if too_old := postgres_too_old(admin.info.server_version):
            raise UnsafeDatabase(too_old)
        # One bootstrap at a time on a server and prefix; freed when the connection ends, however that happens.
        admin.execute("SELECT pg_advisory_lock(hashtextextended(%s, 0))", [f"foldline.bootstrap.{prefix}"])
        for service in SERVICES:
            refuse_newer(_migrations(service), _revisions(admin, admin_url, f"{prefix}_{service}"))
        made = {service: _make(admin, admin_url, prefix, service, known) for service in SERVICES}
        for service, database in made.items():
            roles = {role: f"{prefix}_{service}_{role}" for role in SERVICES[service]}
            migrate(_migrations(service), database.owner, roles)
    return Databases(write=made["write"], read=made["read"], saga=made["saga"], passwords=known)


def _migrations(service: str) -> Path:
    return ROOT / f"{service}_service" / "migrations"


def _revisions(admin: psycopg.Connection, admin_url: str, name: str) -> list[str]:
    """What the database is at: nothing if it is not there, or not yet the administrator's to read."""
    readable = "SELECT pg_has_role(datdba, 'USAGE') FROM pg_database WHERE datname = %s"
    if admin.execute(readable, [name]).fetchone() != (True,):
        return []
    with psycopg.connect(with_database(admin_url, name), autocommit=True) as database:
        if database.execute("SELECT to_regclass('public.alembic_version')").fetchone() == (None,):
            return []
        return [revision for (revision,) in database.execute("SELECT version_num FROM public.alembic_version")]


def drop(admin_url: str, prefix: str) -> None:
    """Deletes the databases and roles of a prefix, with all data."""
    with psycopg.connect(admin_url, autocommit=True) as admin:
        for service, roles in SERVICES.items():
            admin.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(f"{prefix}_{service}")))
            for role in roles:
                admin.execute(sql.SQL("DROP ROLE IF EXISTS {}").format(sql.Identifier(f"{prefix}_{service}_{role}")))


def let_in(admin: psycopg.Connection, database: str, service: str, prefix: str) -> None:
    """Lets the service's roles, and nobody else, connect to a database. A clone does not inherit this."""
    roles = sql.SQL(", ").join(sql.Identifier(f"{prefix}_{service}_{role}") for role in SERVICES[service])
    admin.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(sql.Identifier(database)))
    admin.execute(sql.SQL("GRANT CONNECT ON DATABASE {} TO {}").format(sql.Identifier(database), roles))


def _make(admin: psycopg.Connection, admin_url: str, prefix: str, service: str, passwords: dict[str, str]) -> Database:
    """Makes the roles and the empty database of a service. No other role gets rights on it."""
    name = f"{prefix}_{service}"
    urls: dict[str, str] = {}
    for role in SERVICES[service]:
        full = f"{name}_{role}"
        password = passwords.setdefault(full, secrets.token_urlsafe(24))
        _make_role(admin, full, password)
        urls[role] = with_database(admin_url, name, user=full, password=password)
    for role in SERVICES[service][1:]:
        timeout = sql.SQL("ALTER ROLE {} SET idle_in_transaction_session_timeout = {}")
        admin.execute(timeout.format(sql.Identifier(f"{name}_{role}"), sql.Literal(IDLE_IN_TRANSACTION)))
        for setting, value in SETTINGS.items():
            planner = sql.SQL("ALTER ROLE {} SET {} = {}")
            admin.execute(planner.format(sql.Identifier(f"{name}_{role}"), sql.Identifier(setting), sql.Literal(value)))
        if service != "write":
            age = sql.SQL("ALTER ROLE {} SET transaction_timeout = {}")
            admin.execute(age.format(sql.Identifier(f"{name}_{role}"), sql.Literal(CONSUMERS_TRANSACTION)))
    owner = f"{name}_owner"
    if admin.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]).fetchone() is None:
        # template0, because somebody may have put objects into template1.
        create = sql.SQL("CREATE DATABASE {} OWNER {} TEMPLATE template0 ENCODING 'UTF8'")
        admin.execute(create.format(sql.Identifier(name), sql.Identifier(owner)))
    let_in(admin, name, service, prefix)
    with psycopg.connect(urls["owner"], autocommit=True) as connection:
        users = sql.SQL(", ").join(sql.Identifier(f"{name}_{role}") for role in SERVICES[service][1:])
        connection.execute("REVOKE ALL ON SCHEMA public FROM PUBLIC")
        connection.execute(sql.SQL("GRANT USAGE ON SCHEMA public TO {}").format(users))
        connection.execute("ALTER DEFAULT PRIVILEGES REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC")
    return Database(name=name, admin=with_database(admin_url, name), **urls)


def _make_role(admin: psycopg.Connection, name: str, password: str) -> None:
    """A role that may log in and nothing else. The administrator becomes a member, who may give it a database."""
    role = sql.Identifier(name)
    if admin.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [name]).fetchone() is None:
        admin.execute(sql.SQL("CREATE ROLE {}").format(role))
    # The server would write the statement into its log, password and all, were it to fail: it gets a hash.
    hashed = admin.pgconn.encrypt_password(password.encode(), name.encode(), b"scram-sha-256").decode()
    admin.execute(sql.SQL("ALTER ROLE {} LOGIN PASSWORD {}").format(role, sql.Literal(hashed)))
    superuser = admin.execute("SELECT rolsuper FROM pg_roles WHERE rolname = current_user").fetchone()
    if superuser != (True,):
        admin.execute(sql.SQL("GRANT {} TO CURRENT_USER").format(role))


def bootstrap_with_files(admin_url: str, folder: Path, prefix: str = "foldline") -> Databases:
    """As `bootstrap`, with the URLs in files: `write_app`, `read_query` and so on, as FOLDLINE_DATABASE_URL_FILE wants them.

    A file that is there gives its role's password, so that a secret made elsewhere is taken as it is; a file that is not
    there is written, readable for its owner alone. Killed between the databases and the files, the next run gives the roles
    of the missing files new passwords. Two runs at once on one folder take turns, so the files and the databases agree.
    Raises, before anything is made or changed, ValueError for a file that holds no URL of its role, and for a folder that is not
    there, or in which missing files cannot be written.
    """
    with _folder_lock(folder):
        if not all((folder / f"{service}_{role}").exists() for service, roles in SERVICES.items() for role in roles):
            _refuse_unwritable(folder)
        databases = bootstrap(admin_url, prefix, passwords=dict(_passwords_in(folder, prefix)))
        for service, roles in SERVICES.items():
            database: Database = getattr(databases, service)
            for role in roles:
                file = folder / f"{service}_{role}"
                if not file.exists():
                    write_secret(file, getattr(database, role))
    return databases


@contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder, which may be read-only; the kernel frees it if the process is killed."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ValueError(f"--files: the folder {folder} cannot be read: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _refuse_unwritable(folder: Path) -> None:
    """Raises ValueError if no file can be made in a folder: the passwords of the roles would be known to nobody."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"--files: the folder {folder} cannot be written: {error.strerror}") from None


def _passwords_in(folder: Path, prefix: str) -> Iterator[tuple[str, str]]:
    for service, roles in SERVICES.items():
        for role in roles:
            file, user = folder / f"{service}_{role}", f"{prefix}_{service}_{role}"
            if file.exists():
                parts = urlsplit(file.read_text().strip())
                if unquote(parts.username or "") != user or not parts.password:
                    raise ValueError(f"{file} holds no URL with the user {user} and a password")
                yield user, unquote(parts.password)


def write_secret(file: Path, content: str) -> None:
    """Writes a file atomically, readable only by its owner."""
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    fresh.touch(mode=0o600)
    fresh.write_text(content + "\n")
    fresh.chmod(0o400)
    fresh.replace(file)


def administrators_url(environment: Mapping[str, str]) -> str:
    """The URL in DATABASE_URL, or in the file that DATABASE_URL_FILE names; empty if neither is set.

    Raises ValueError, without the URL, if both are set, the file cannot be read, or it is no URL of PostgreSQL.
    """
    variable, url, file = "DATABASE_URL", environment.get("DATABASE_URL", ""), environment.get("DATABASE_URL_FILE", "")
    if url and file:
        raise ValueError("DATABASE_URL and DATABASE_URL_FILE are both set: give the administrator's URL once")
    if file:
        variable = "DATABASE_URL_FILE"
        try:
            url = Path(file).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{variable}: {file} cannot be read: {getattr(error, 'strerror', 'it is no text')}") from None
    if file or url:
        try:
            refuse_admin_url(url)
        except ValueError as error:
            raise ValueError(f"{variable}: {error}") from None
    return url


def _wait_for_server(url: str, seconds: float) -> None:
    """Returns when the server takes a connection, or after so many seconds; what is wrong then shows at the first use."""
    give_up_at = time.monotonic() + seconds
    while time.monotonic() < give_up_at:
        try:
            psycopg.connect(url, connect_timeout=2).close()
        except psycopg.OperationalError:
            time.sleep(ASK_AGAIN_S)
        else:
            return


def main() -> int:
    """Bootstraps the server of DATABASE_URL, or of the URL in the file that DATABASE_URL_FILE names."""
    parser = argparse.ArgumentParser(
        prog="python -m deploy.bootstrap", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prefix", nargs="?", default="foldline", help="the names of databases and roles begin with it")
    parser.add_argument("--files", type=Path, metavar="FOLDER", help="keep the URLs in files of this folder, print nothing")
    parser.add_argument(
        "--wait", type=float, default=0, metavar="SECONDS", help="how long to wait for a server that does not answer yet (0)"
    )
    arguments = parser.parse_args()
    if unknown := unknown_variables(os.environ):
        print(*unknown, sep="\n", file=sys.stderr)
        return 2
    try:
        if not (url := administrators_url(os.environ)):
            raise ValueError("set DATABASE_URL to an administrator's URL, or DATABASE_URL_FILE to a file that holds it")
        _wait_for_server(url, arguments.wait)
        if arguments.files:
            bootstrap_with_files(url, arguments.files, arguments.prefix)
            print(f"the databases {arguments.prefix}_write, _read and _saga are ready")
        else:
            print(json.dumps(asdict(bootstrap(url, arguments.prefix)), indent=2))
    except (ValueError, UnsafeDatabase) as error:
        print(error, file=sys.stderr)
        return 2
    except (psycopg.OperationalError, psycopg.errors.InsufficientPrivilege) as error:
        print(f"the database server cannot be used: {str(error).strip()}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

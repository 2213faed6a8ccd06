"""The public keys of the issuer of tokens, a JSON Web Key Set, from a file or a URL. They rotate without a restart."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from joserfc.errors import JoseError
from joserfc.jwk import ECKey, KeySet, OKPKey

from shared.folds.errors import Unavailable
from shared.platform.addresses import is_public
from shared.platform.certificates import read_authorities
from shared.platform.telemetry import logger

REFRESH_S = 300.0
"""A key set is fetched so often."""
FETCHES_APART_S = 10.0
"""The shortest time between two fetches, whatever is asked for."""
FETCH_TIMEOUT_S = 5.0
"""How long an answer may take, from the connection to its last byte."""
SIZE_MAX = 256 * 1024
ABSENT_MAX = 1000

Clock = Callable[[], float]
Key: TypeAlias = ECKey | OKPKey

log = logger(__name__)


class Keys(Protocol):
    """Public keys by their ids."""

    def current(self) -> dict[str, Key]:
        """The keys by id, as the same object until they change."""

    def ask_for(self, kid: str) -> None:
        """Hears of a key that is not among them. Raises Unavailable (KEYS_AWAITED) if it may be known in a moment."""

    async def run(self) -> None:
        """Keeps the keys fresh until it is cancelled."""

    async def failure(self) -> str:
        """A check of readiness."""


class KeyFile:
    """The issuer's public keys, from a file. It is read again when it changes: keys rotate without a restart."""

    def __init__(self, path: Path, *, clock: Clock = time.monotonic) -> None:
        """Raises OSError or ValueError if there is no usable set of keys at `path`."""
        self._path = path
        self._clock = clock
        self._looked_at = clock()
        self._stamp, self._keys = self._read()

    def current(self) -> dict[str, Key]:
        """The keys by id, as the same object until they change. Checks the file at most once a second.

        If the file is gone or broken, the last good keys stay valid, and the log says so.
        """
        now = self._clock()
        if now - self._looked_at >= 1:
            self._looked_at = now
            try:
                if _stamp(self._path) != self._stamp:
                    self._stamp, self._keys = self._read()
                    log.info("keys_reloaded", keys=sorted(self._keys))
            except (OSError, ValueError) as error:
                log.warning("keys_not_reloaded", file=str(self._path), error=str(error))
        return self._keys

    def ask_for(self, kid: str) -> None:
        """What is not in the file is unknown."""

    async def run(self) -> None:
        """Nothing: the file is looked at when keys are asked for."""

    async def failure(self) -> str:
        """There are keys from the start."""
        return ""

    def _read(self) -> tuple[tuple[int, int, int], dict[str, Key]]:
        stamp = _stamp(self._path)
        return stamp, parse(self._path.read_bytes(), str(self._path))


class KeyUrl:
    """The issuer's public keys from a URL. They are fetched in another thread, every five minutes.

    A key that is not among them is asked for once, and never sooner than ten seconds after the fetch before, so tokens that
    name random keys cause no more fetches than that. While the URL is away, the keys that are known stay valid.
    """

    def __init__(
        self,
        url: str,
        *,
        ca_file: Path | None = None,
        allow_private: bool = False,
        clock: Clock = time.monotonic,
        refresh_s: float = REFRESH_S,
        apart_s: float = FETCHES_APART_S,
    ) -> None:
        """`ca_file` has the authorities of the server's certificate. `allow_private` lets private addresses pass, also by http.

        Raises ValueError for a file without certificates.
        """
        self._url, self._allow_private = url, allow_private
        self._authorities = None if ca_file is None else read_authorities(ca_file).decode("ascii")
        self._clock, self._refresh_s, self._apart_s = clock, refresh_s, apart_s
        self._keys: dict[str, Key] = {}
        self._failure = "the keys that tokens are verified with have not been fetched yet"
        self._fetched_at = 0.0
        self._fetching = False
        self._absent: set[str] = set()
        self._wanted = asyncio.Event()

    def current(self) -> dict[str, Key]:
        """The keys of the last fetch that succeeded."""
        return self._keys

    def ask_for(self, kid: str) -> None:
        """Has the set fetched for a key that is not in it, unless it was already, or the last fetch is too young.

        Raises Unavailable (KEYS_AWAITED) while a fetch is under way that may bring it.
        """
        if self._keys and not kid:
            return
        if self._keys and not self._fetching and not self._wanted.is_set():
            young = self._clock() - self._fetched_at < self._apart_s
            if young or kid in self._absent or len(self._absent) >= ABSENT_MAX:
                return
            self._absent.add(kid)
            self._wanted.set()
        raise Unavailable(
            "KEYS_AWAITED", "the keys of the issuer are being fetched; the same call may be made again", retry_after_s=1
        )

    async def run(self) -> None:
        """Fetches the set now, every `refresh_s`, and when a key is asked for. What fails is tried again after `apart_s`."""
        told = ""
        while True:
            self._fetching = True
            self._wanted.clear()
            try:
                keys = parse(await _in_thread(self._fetch), "the key set")
            except (OSError, ValueError) as error:
                if str(error) != told:
                    log.warning("keys_not_fetched", error=str(error), known=sorted(self._keys))
                told, pause_s = str(error), self._apart_s
                if not self._keys:
                    self._failure = f"the keys that tokens are verified with cannot be fetched: {error}"
            else:
                if _ids(keys) != _ids(self._keys):
                    log.info("keys_reloaded", keys=sorted(keys))
                    self._keys = keys
                self._failure = told = ""
                pause_s = self._refresh_s * random.uniform(0.9, 1.1)  # noqa: S311 (instances should not ask all at once)
            self._fetching = False
            self._fetched_at = self._clock()
            try:
                async with asyncio.timeout(pause_s):
                    await self._wanted.wait()
            except TimeoutError:
                self._absent.clear()

    async def failure(self) -> str:
        """Why there are no keys; empty once there are."""
        return self._failure

    def _fetch(self) -> bytes:
        """The set, in a loop of its own, so that the time limit holds for all of it, the answer's header too.

        Raises OSError or ValueError, whose text holds nothing of the URL but its host.
        """
        import httpx  # noqa: PLC0415 (takes a second, and not every process needs it)

        url = httpx.URL(self._url)
        address = self._address(url.scheme, url.host, url.port)
        context = ssl.create_default_context(cadata=self._authorities)
        host = url.host if url.port is None else f"{url.host}:{url.port}"

        async def get() -> bytes:
            content = b""
            # No proxy of the environment, and no redirection: both would lead to an address that was not checked.
            async with (
                asyncio.timeout(FETCH_TIMEOUT_S),
                httpx.AsyncClient(verify=context, follow_redirects=False, trust_env=False, timeout=FETCH_TIMEOUT_S) as client,
                client.stream(
                    "GET", url.copy_with(host=address), headers={"host": host}, extensions={"sni_hostname": url.host}
                ) as answer,
            ):
                if answer.status_code != 200:
                    raise ValueError(f"{url.host} answered {answer.status_code}")
                async for part in answer.aiter_bytes():
                    content += part
                    if len(content) > SIZE_MAX:
                        raise ValueError(f"{url.host} answered more than {SIZE_MAX} bytes")
            return content

        try:
            return asyncio.run(get())
        except TimeoutError:
            raise ValueError(f"{url.host} did not answer in full within {FETCH_TIMEOUT_S:g} s") from None
        except httpx.HTTPError as error:
            raise ValueError(f"{url.host}: {type(error).__name__}: {error}") from None

    def _address(self, scheme: str, host: str, port: int | None) -> str:
        """An address of the host, after all its addresses were checked."""
        found = socket.getaddrinfo(host, port or (443 if scheme == "https" else 80), type=socket.SOCK_STREAM)
        addresses = [str(each[4][0]) for each in found]
        private = [address for address in addresses if not is_public(address)]
        if private and not self._allow_private:
            raise ValueError(f"{host} has an address that is not public, and FOLDLINE_JWKS_PRIVATE is not set")
        if scheme != "https" and len(private) < len(addresses):
            raise ValueError(f"{host} is public: it must be https")
        return addresses[0]


def parse(content: bytes, what: str) -> dict[str, Key]:
    """The keys of a set that can verify tokens, by id. Raises ValueError, which names the set as `what`."""
    try:
        key_set = KeySet.import_key_set(json.loads(content))
    except (JoseError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not a set of keys") from error
    keys: dict[str, Key] = {}
    for key in key_set.keys:
        if isinstance(key, ECKey | OKPKey) and key.kid and key.curve_name in ("P-256", "Ed25519"):
            keys[key.kid] = key
    if not keys:
        raise ValueError(f"{what} holds no key that is Ed25519 or P-256 and has a kid")
    return keys


async def _in_thread(fetch: Callable[[], bytes]) -> bytes:
    """What `fetch` returns or raises. Its thread keeps nobody from ending, however long the network takes."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[bytes] = loop.create_future()

    def end(result: bytes, error: Exception | None) -> None:
        if done.done():  # cancelled
            return
        if error is None:
            done.set_result(result)
        else:
            done.set_exception(error)

    def work() -> None:
        result, failure = b"", None
        try:
            result = fetch()
        except Exception as error:  # noqa: BLE001 (raised where it is waited for)
            failure = error
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(end, result, failure)

    threading.Thread(target=work, name="foldline-keys", daemon=True).start()
    return await done


def _ids(keys: dict[str, Key]) -> dict[str, Any]:
    return {kid: key.as_dict(private=False) for kid, key in keys.items()}


def _stamp(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_ino, found.st_size

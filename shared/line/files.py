"""Where the files of the archive and of the histories are kept: in a folder of this machine, or in an object store.

What is written in a folder of this machine outlasts a power cut as soon as the writing has ended.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Protocol
from urllib.parse import quote, unquote, urlsplit

from msgspec import Struct
from obstore import exceptions
from obstore.store import ObjectStore, from_url
from pydantic import AfterValidator

from shared.folds.errors import Refusal, Unavailable

DELETED_AT_ONCE = 500


class Store(Protocol):
    """Where files are kept by path. Errors are those of the system (OSError) and of obstore."""

    async def write(self, path: str, data: bytes) -> None:
        """Writes a file as a whole; when this ends, it outlasts a power cut."""

    async def read(self, path: str) -> bytes:
        """The content of a file; raises FileNotFoundError."""

    async def forget(self, folder: str) -> int:
        """Deletes all files below a folder; returns how many there were."""


class Files(Struct, frozen=True):
    """A store in obstore; `folder` is set if it is one of this machine."""

    store: ObjectStore
    folder: Path | None

    async def write(self, path: str, data: bytes) -> None:
        """As in Store. A file of this machine is written under another name first, then renamed and synced."""
        await self.store.put_async(path, data)
        if self.folder is not None:
            await asyncio.to_thread(_sync, self.folder, path)

    async def read(self, path: str) -> bytes:
        """As in Store."""
        return bytes(await (await self.store.get_async(path)).bytes_async())

    async def paths(self, folder: str) -> list[str]:
        """The paths of all files below a folder, in order."""
        return sorted([found["path"] async for page in self.store.list(folder) for found in page])

    async def forget(self, folder: str) -> int:
        """As in Store. Of a folder of this machine the empty folders go too.

        Two at once: whoever meets a file that the other has deleted lists anew what is left, and counts it alone.
        """
        count, whole = 0, False
        while not whole:
            try:
                async for page in self.store.list(folder, chunk_size=DELETED_AT_ONCE):
                    await self.store.delete_async([found["path"] for found in page])
                    count += len(page)
                whole = True
            except FileNotFoundError:
                continue
        if self.folder is not None:
            await asyncio.to_thread(shutil.rmtree, self.folder / folder, ignore_errors=True)
        return count


def open_files(url: str) -> Files:
    """The store at a URL: `file:///folder`, which is made if it is not there, `s3://bucket/path`, or another of obstore.

    Credentials for an object store come from its own variables (AWS_ACCESS_KEY_ID …). Raises ValueError for a URL that names
    no store, and for a folder that cannot be made or written.
    """
    with _usable():
        if (folder := _folder(url)) is None:
            return Files(from_url(url), None)
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(f"{folder} cannot be written")
        return Files(from_url(url), folder)


def _store_url(url: str) -> str:
    if url:
        with _usable():
            if _folder(url) is None:
                from_url(url)
    return url


StoreUrl = Annotated[str, AfterValidator(_store_url)]
"""A URL that `open_files` takes, or nothing. Nothing is made or called when it is looked at."""


def _folder(url: str) -> Path | None:
    """The folder that a URL names; None if it is one of an object store."""
    parts = urlsplit(url)
    if parts.scheme != "file":
        return None
    if parts.netloc or not parts.path.startswith("/"):
        raise ValueError("a folder is named like file:///folder")
    return Path(unquote(parts.path))


@contextmanager
def _usable() -> Iterator[None]:
    try:
        yield
    except (exceptions.BaseError, OSError, ValueError) as error:
        said = str(error).partition("\n")[0]
        raise ValueError(f"the archive's URL cannot be used: {said}") from error


def segment(name: str) -> str:
    """A name as one part of a path, which it cannot leave."""
    return quote(name, safe="").replace(".", "%2E")


def _sync(folder: Path, path: str) -> None:
    """Makes a file outlast a power cut, with the names of all folders that lead to it."""
    at = folder / path
    while True:
        descriptor = os.open(at, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if at == folder:
            return
        at = at.parent


@contextmanager
def refusals() -> Any:
    """Turns what a store says into a refusal."""
    try:
        yield
    except Refusal:
        raise
    except (OSError, exceptions.BaseError) as error:
        # The store's text may name places and hosts that are no business of the caller.
        text = f"the archive cannot be used now ({type(error).__name__}); the same call may be made again"
        raise Unavailable("ARCHIVE_UNAVAILABLE", text) from error

"""What Prometheus would have of a system: the samples of its processes' metrics, for queries that tests evaluate."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping

from prometheus_client.parser import text_string_to_metric_families

from deploy.local.system import PROJECTOR, READ, RELAY, SAGA, WRITE
from tests.support.checks.promql import Store
from tests.support.system.stack import Stack

PROCESSES = (WRITE, RELAY, READ, PROJECTOR, SAGA)
Sample = tuple[str, Mapping[str, str], float]
"""A metric's name, its labels and its value."""


class Scrapes:
    """The samples of all processes of a system, scraped when a test wants it."""

    def __init__(self, stack: Stack) -> None:
        self.store = Store()
        self.at_s = 0.0
        """When the last scrape was."""
        self._stack = stack

    async def take(self, others: Mapping[str, str] | None = None, *, later_s: float = 0.0) -> None:
        """Scrapes all processes. `others` are pages of further instances; `later_s` lets it be as long after now."""
        self.at_s = time.time() + later_s
        for name in PROCESSES:
            try:
                page = await page_of(self._stack.programs[name].admin_port, "/metrics")
            except OSError:
                self._add(name, "", up=0.0)
            else:
                self._add(name, page, up=1.0)
        for name, page in (others or {}).items():
            self._add(name, page, up=1.0)

    def _add(self, instance: str, page: str, *, up: float) -> None:
        self.store.scrape(instance, self.at_s, [("up", {"job": "foldline"}, up), *samples(page)])


def samples(page: str) -> Iterator[Sample]:
    """The samples of a page, as Prometheus adds them to its own."""
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            yield sample.name, {**sample.labels, "job": "foldline"}, sample.value


async def page_of(port: int, path: str) -> str:
    """A page of an admin port. Raises OSError if nobody answers."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    _, _, body = (await asyncio.wait_for(reader.read(), 10)).partition(b"\r\n\r\n")
    writer.close()
    return body.decode()

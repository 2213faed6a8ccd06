"""A name server that does not know a name at first."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator
from typing import cast

_A = 1
_NO_SUCH_NAME = 3
_HEADER = struct.Struct(">HHHHHH")


class NameServer(asyncio.DatagramProtocol):
    """The first look-up finds no name; from the next one on every name is that of this machine."""

    def __init__(self) -> None:
        self.port = 0
        self.refused: set[bytes] = set()
        """The questions that found nothing, each as it was asked: of one look-up those for both kinds of addresses."""
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.DatagramTransport", transport)
        self.port = transport.get_extra_info("sockname")[1]

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        query, *_ = _HEADER.unpack_from(data)
        end = data.index(b"\0", _HEADER.size) + 5
        question = data[_HEADER.size : end]
        kind = struct.unpack(">H", question[-4:-2])[0]
        first = question not in self.refused
        self.refused.add(question)
        answers = int(kind == _A and not first)
        flags = 0x8180 | (_NO_SUCH_NAME if first else 0)
        address = struct.pack(">HHHLH4B", 0xC00C, _A, 1, 0, 4, 127, 0, 0, 1) if answers else b""
        assert self._transport is not None
        self._transport.sendto(_HEADER.pack(query, flags, 1, answers, 0, 0) + question + address, addr)


@contextlib.asynccontextmanager
async def name_server() -> AsyncIterator[NameServer]:
    """A name server on a port of its own: `dns://127.0.0.1:PORT/NAME:PORT` is an address for gRPC that asks it."""
    loop = asyncio.get_running_loop()
    transport, server = await loop.create_datagram_endpoint(NameServer, local_addr=("127.0.0.1", 0))
    try:
        yield server
    finally:
        transport.close()

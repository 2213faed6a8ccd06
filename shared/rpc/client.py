"""Channels to our services: one long-lived channel a peer. The generated stubs are used as they are.

Each call is a client span where traces are recorded (`shared/rpc/client_spans.py`).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import grpc
from grpc import aio

from shared.platform import tracing
from shared.platform.certificates import Tls, TlsFiles
from shared.platform.urls import TLS_SCHEME
from shared.rpc.client_spans import TracedMethod
from shared.rpc.held import hold_grpc

# Larger than the limits of our servers, so that the caller sees the server's refusal and not gRPC's own.
_MESSAGE_SIZE_MAX = 8 * 1024 * 1024
# Calls that began under a former certificate may go on for so long; the longest of ours, a reading of the line, is shorter.
_FORMER_CALLS_S = 900.0
CONNECT_S_MAX = 3.0

# gRPC itself repeats a call that is UNAVAILABLE: commands are idempotent by their ids, and queries change nothing. So it does one
# that the server cancelled, which is what gRPC says of a call that reaches a server in the moment in which it stops. The pauses
# come to three seconds, longer than a channel needs to notice that a replica is back, so one that ends meanwhile is not missed.
# Addresses take turns only where calls are repeated: round_robin fails each call at once while it has no connection, for up to a
# second after a lone replica is back; pick_first connects for the call.
_REPEATED_IN_TURNS: dict[str, Any] = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 3,
                "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
            },
        }
    ],
}

OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.max_receive_message_length", _MESSAGE_SIZE_MAX),
    ("grpc.max_send_message_length", _MESSAGE_SIZE_MAX),
    # A cut network is noticed within 20 s. Servers of ours allow a ping every 5 s; a server that allows less closes the
    # connection (too_many_pings).
    ("grpc.keepalive_time_ms", 15_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # The channel reconnects within a second when the peer is back.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)


def channel(target: str, *, retries: bool = True, tls: TlsFiles | None = None) -> aio.Channel:
    """A channel to `host:port`, or to a name that resolves to several. Close it, or use it with `async with`.

    `grpcs://host:port` is reached over TLS, with the certificates of `tls`, or the usual public authorities. Without
    `retries` the first UNAVAILABLE comes through, and the first address of a name that answers has all calls; with them the
    addresses take turns. Raises ValueError for certificates that cannot be used.
    """
    hold_grpc()
    config = _REPEATED_IN_TURNS if retries else {}
    options = [*OPTIONS, ("grpc.service_config", json.dumps(config)), ("grpc.enable_retries", int(retries))]
    if target.startswith(TLS_SCHEME):
        return _TlsChannel(target.removeprefix(TLS_SCHEME), options, TlsFiles() if tls is None else tls)
    return _Channel(target, aio.insecure_channel(target, options=options))


class _Channel(aio.Channel):
    """A channel of gRPC's with a span for each call whose trace is recorded."""

    def __init__(self, target: str, channel: aio.Channel) -> None:
        self._target = target
        self._channel = channel

    def _current(self) -> aio.Channel:
        return self._channel

    def _method(self, kind: str, *route: Any, **options: Any) -> Callable[..., Any]:
        """What a stub calls: it makes the method anew for each new channel."""
        channel: aio.Channel | None = None
        method: Any = None
        traced = TracedMethod(route[0].removeprefix("/"), self._target)

        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal channel, method
            current = self._current()
            if current is not channel:
                channel, method = current, getattr(current, kind)(*route, **options)
            return traced.call(method, arguments, named) if tracing.on() else method(*arguments, **named)

        return call

    def unary_unary(self, *route: Any, **options: Any) -> Any:
        return self._method("unary_unary", *route, **options)

    def unary_stream(self, *route: Any, **options: Any) -> Any:
        return self._method("unary_stream", *route, **options)

    def stream_unary(self, *route: Any, **options: Any) -> Any:
        return self._method("stream_unary", *route, **options)

    def stream_stream(self, *route: Any, **options: Any) -> Any:
        return self._method("stream_stream", *route, **options)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._current().get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._current().channel_ready()

    async def close(self, grace: float | None = None) -> None:
        await self._channel.close(grace)

    async def __aenter__(self) -> _Channel:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()


class _TlsChannel(_Channel):
    """A channel over TLS. Calls that begin after its certificates changed go over a connection made with the new ones.

    gRPC itself reads a client's certificate once: a channel that lives long would be refused when its certificate expires.
    """

    def __init__(self, target: str, options: Sequence[tuple[str, int | str]], tls: TlsFiles) -> None:
        self._options = options
        self._files = tls
        self._tls = tls.current()
        self._former: set[asyncio.Task[None]] = set()
        super().__init__(target, self._open(target))

    def _open(self, target: str) -> aio.Channel:
        return aio.secure_channel(target, _credentials(self._tls), options=self._options)

    def _current(self) -> aio.Channel:
        if (tls := self._files.current()) is not self._tls:
            self._tls = tls
            former, self._channel = self._channel, self._open(self._target)
            closing = asyncio.get_running_loop().create_task(former.close(_FORMER_CALLS_S))
            self._former.add(closing)
            closing.add_done_callback(self._former.discard)
        return self._channel

    async def close(self, grace: float | None = None) -> None:
        for closing in self._former:
            closing.cancel()
        await asyncio.gather(*self._former, return_exceptions=True)
        await super().close(grace)


def _credentials(tls: Tls) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(tls.authorities, *((tls.pair.key, tls.pair.chain) if tls.pair else ()))


async def connected(through: aio.Channel, within_s: float = CONNECT_S_MAX) -> bool:
    """Whether the channel has a connection, for which it is given some time.

    gRPC repeats no call while the name of the peer is not known: one that is looked up in the moment in which a name server
    does not have it would fail, though the next look-up, a second later, finds it.
    """
    try:
        async with asyncio.timeout(within_s):
            await through.channel_ready()
    except TimeoutError:
        return False
    return True


def bearer(token: str, *, traceparent: str | None = None) -> tuple[tuple[str, str], ...]:
    """The metadata of a call: `await stub.GetPerson(request, metadata=bearer(token), timeout=5)`."""
    authorization = (("authorization", f"Bearer {token}"),)
    return authorization if traceparent is None else (*authorization, ("traceparent", traceparent))

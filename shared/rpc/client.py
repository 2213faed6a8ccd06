"""Channels to our services: one long-lived channel a peer. The generated stubs are used as they are."""

from __future__ import annotations

import json

from grpc import aio

# Larger than the limits of our servers, so that the caller sees the server's refusal and not gRPC's own.
_MESSAGE_SIZE_MAX = 8 * 1024 * 1024

# gRPC itself repeats a call that is UNAVAILABLE: commands are idempotent by their ids, and queries change nothing. The pauses
# come to three seconds, longer than a channel needs to notice that a replica is back, so one that ends meanwhile is not missed.
_SERVICE_CONFIG = json.dumps(
    {
        "loadBalancingConfig": [{"round_robin": {}}],
        "methodConfig": [
            {
                "name": [{}],
                "retryPolicy": {
                    "maxAttempts": 5,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 3,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ],
    }
)

OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.service_config", _SERVICE_CONFIG),
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


def channel(target: str, *, retries: bool = True) -> aio.Channel:
    """A channel to `host:port`, or to a name that resolves to several. Close it, or use it with `async with`.

    Without `retries` the first UNAVAILABLE comes through.
    """
    options = OPTIONS if retries else tuple(option for option in OPTIONS if option[0] != "grpc.service_config")
    return aio.insecure_channel(target, options=[*options, ("grpc.enable_retries", int(retries))])


def bearer(token: str, *, traceparent: str | None = None) -> tuple[tuple[str, str], ...]:
    """The metadata of a call: `await stub.GetPerson(request, metadata=bearer(token), timeout=5)`."""
    authorization = (("authorization", f"Bearer {token}"),)
    return authorization if traceparent is None else (*authorization, ("traceparent", traceparent))

"""Engines that are too old are refused by name."""

from __future__ import annotations

from urllib.parse import urlparse

import pytest
from nats.aio.client import Client, Srv

from shared.line.broker_access import BrokerTooOld, refuse_old
from shared.platform.versions import nats_too_old, postgres_too_old


@pytest.mark.parametrize(
    ("version", "sentence"),
    [
        (150018, "POSTGRES_TOO_OLD: this is PostgreSQL 15, and 17 or newer is needed"),
        (160010, "POSTGRES_TOO_OLD: this is PostgreSQL 16, and 17 or newer is needed"),
        (90624, "POSTGRES_TOO_OLD: this is PostgreSQL 9, and 17 or newer is needed"),
        (170000, ""),
        (180006, ""),
    ],
)
def test_a_postgresql_without_a_limit_for_transactions_is_refused(version: int, sentence: str) -> None:
    """`transaction_timeout` came with 17."""
    assert postgres_too_old(version) == sentence


@pytest.mark.parametrize(
    ("version", "sentence"),
    [
        ((2, 10), "NATS_TOO_OLD: this is NATS 2.10, and 2.11 or newer is needed"),
        ((1, 12), "NATS_TOO_OLD: this is NATS 1.12, and 2.11 or newer is needed"),
        ((2, 11), ""),
        ((3, 0), ""),
    ],
)
def test_a_nats_that_cannot_hold_the_stream_is_refused(version: tuple[int, int], sentence: str) -> None:
    """By its own number, not by that of the text."""
    assert nats_too_old(*version) == sentence


@pytest.mark.parametrize("told", ["", "0.0.0-unknown", "somebody's own", "2.11.0", "2.12.8-RC.1"])
def test_a_version_that_is_new_enough_or_no_number_is_not_refused(told: str) -> None:
    """Nor is a server that is away, of which nothing is known."""
    client = Client()
    client._current_server = Srv(urlparse("nats://a:4222"), server_version=told or None)
    refuse_old(client)
    client._current_server = None
    refuse_old(client)


def test_the_servers_own_word_counts() -> None:
    """As it came with its greeting."""
    client = Client()
    client._current_server = Srv(urlparse("nats://a:4222"), server_version="2.9.10")
    with pytest.raises(BrokerTooOld, match=r"NATS_TOO_OLD: this is NATS 2\.9, and 2\.11"):
        refuse_old(client)

"""Keeps the totals of all deposits: `python -m examples.subscriber follow` and, for dead letters, `... replay`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sqlite3
import sys
from pathlib import Path

import grpc.aio

from bank.v1 import account_pb2
from examples.subscriber.inbox import Event, Handler, Inbox, Overtaken
from examples.subscriber.line import HistoryDiverged, Line

TRIES, PAUSE_S = 3, 0.2

log = logging.getLogger("subscriber")
DEPOSITED = account_pb2.MoneyDeposited.DESCRIPTOR.full_name


def add_deposit(database: sqlite3.Connection, event: Event) -> None:
    """The handler: what this subscriber makes of an event. It writes through `database` alone, and ignores unknown types."""
    if event.type != DEPOSITED:
        return
    deposit = account_pb2.MoneyDeposited.FromString(event.payload)
    database.execute(
        "INSERT INTO totals VALUES (?, ?, 1, ?) ON CONFLICT (tenant, currency) "
        "DO UPDATE SET deposits = deposits + 1, amount_minor = amount_minor + excluded.amount_minor",
        (event.tenant, deposit.currency, deposit.amount_minor),
    )


async def follow(line: Line, inbox: Inbox, handler: Handler = add_deposit) -> None:
    """Handles every event of the line, in order, without end. Raises Overtaken and HistoryDiverged."""
    async for epoch, event in line.after(inbox.place()):
        for attempt in range(1, TRIES + 1):
            try:
                inbox.handle(epoch, event, handler)
                break
            except Overtaken:
                raise
            except Exception as error:  # noqa: BLE001 (whatever the handler says, the next event's turn comes)
                log.warning("position %s, try %s: %r", event.position, attempt, error)
                if attempt == TRIES:
                    inbox.give_up(epoch, event, error)
                else:
                    await asyncio.sleep(PAUSE_S * 2**attempt)


async def replay(line: Line, inbox: Inbox, handler: Handler = add_deposit) -> int:
    """Handles the dead letters anew; returns how many are left."""
    for position in inbox.dead_letters():
        try:
            inbox.replay(await line.one(position), handler)
        except Exception as error:  # noqa: BLE001 (it stays a dead letter)
            log.warning("position %s: %r", position, error)
    return len(inbox.dead_letters())


async def run(arguments: argparse.Namespace) -> int:
    """One run of the command line; returns the exit code."""
    inbox = Inbox(arguments.file)
    try:
        async with grpc.aio.insecure_channel(arguments.write) as store:
            line = Line(store, arguments.token, arguments.nats, arguments.shard)
            if arguments.action == "replay":
                return 1 if await replay(line, inbox) else 0
            if arguments.start is not None:
                inbox.begin_anew(await line.before(arguments.start))
            await follow(line, inbox)
    except (HistoryDiverged, Overtaken, LookupError) as stop:
        log.error("stopped: %s", stop)  # noqa: TRY400 (an operator's business, no defect)
        return 3
    finally:
        inbox.close()
    return 0


def _position(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("a position is a number from 1 on")
    return int(text)


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.subscriber", description=__doc__)
    parser.add_argument("action", choices=("follow", "replay"))
    told = "with follow: forget the totals and the dead letters, and handle the events from this position on anew"
    parser.add_argument("--from", dest="start", type=_position, metavar="POSITION", help=told)
    parser.add_argument("--write", required=True, help="address of the write service, host:port")
    parser.add_argument("--nats", required=True, help="URL of NATS")
    parser.add_argument("--token", required=True, help="a token with role `reader`")
    parser.add_argument("--file", type=Path, default=Path("subscriber.sqlite"), help="where places and totals are kept")
    parser.add_argument("--shard", type=int, default=1)
    logging.basicConfig(format="%(asctime)s %(message)s")
    return asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())

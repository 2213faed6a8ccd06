"""Between the RPCs and the committer: makes commands of valid requests, and receipts or refusals of their outcomes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from datetime import datetime, timedelta
from typing import Any

from google.protobuf.any_pb2 import Any as Packed
from google.protobuf.message import DecodeError
from google.rpc import status_pb2
from msgspec.structs import replace

from foldline.v1 import command_pb2
from shared.commands.committer import Committer
from shared.commands.decide import Command, Outcome, Sender
from shared.commands.intake import PendingReply, is_final, outcome_again
from shared.commands.log import CommandKey, StoredCommand, read_commands
from shared.commands.registry import Prepare, Route
from shared.commands.sweeper import made_before
from shared.folds.errors import BatchAborted, Forbidden, Invalid, OverLimit, Refusal
from shared.folds.ids import is_of_processes
from shared.line.consistency import Token, encode
from shared.platform.clock import timestamp
from shared.platform.fairness import Turns
from shared.platform.identity import Call, Role, current_call, seen_position
from shared.platform.postgres import Reads
from shared.platform.seal import Seal
from shared.platform.telemetry import annotate, trace_id, valid_traceparent
from shared.rpc.status import to_status
from shared.rpc.validation import refuse_invalid

COMMAND_BYTES_MAX = 64 * 1024
STREAM_WINDOW = 256
# Items of a batch that are decoded, or answered, at one turn of the event loop: about 0.4 ms.
SLICE = 16

Receipts = list[command_pb2.CommandReceipt]

STATUSES = {
    "scheduled": command_pb2.COMMAND_STATUS_SCHEDULED,
    "started": command_pb2.COMMAND_STATUS_STARTED,
    "completed": command_pb2.COMMAND_STATUS_COMPLETED,
    "rejected": command_pb2.COMMAND_STATUS_REJECTED,
    "failed": command_pb2.COMMAND_STATUS_FAILED,
    "cancelled": command_pb2.COMMAND_STATUS_CANCELLED,
}


class CommandBus:
    """Sends the current caller's commands to the committer of a shard."""

    def __init__(
        self,
        committer: Committer,
        reads: Reads,
        seal: Seal,
        *,
        clock: Callable[[], datetime],
        kept: timedelta | None = None,
        size_max: int = COMMAND_BYTES_MAX,
    ) -> None:
        """`kept`: how long rows of the command log are kept; None: for ever. `size_max`: of a packed command, in bytes."""
        self._kept = kept
        self._size_max = size_max
        self._committer = committer
        self._reads = reads
        self._clock = clock
        self._seal = seal
        self._newest_head = (-1, "")
        self._newest_tokens: dict[str, str] = {}
        self._turns = Turns()

    async def send(self, request: Any) -> command_pb2.CommandReceipt:
        """Carries out one validated command; raises the Refusal if it is refused."""
        route = self._committer.registry.route(request.DESCRIPTOR.full_name)
        assert route is not None  # a test holds the typed RPCs to the table
        command = _command(route, request, _sender(current_call.get()), self._clock())
        if self._kept is not None:
            await self.refuse_expired(command)
        if route.prepare is None:
            [[outcome]] = await self._committer.submit([[command]])
            epoch = self._committer.epoch
        else:
            outcome, epoch = await self._prepared(command, route.prepare)
        if outcome.refusal is not None:
            if outcome.head:
                outcome.refusal.facts["consistency_token"] = self._token(outcome.head, epoch)
            raise outcome.refusal
        return self._receipt(command, outcome, epoch)

    async def _prepared(self, command: Command, prepare: Prepare[Any]) -> tuple[Outcome, str]:
        """Prepares a command and submits it; returns its outcome, and the epoch of the line that the outcome's head is on.

        Preparing is dear, so a repeat is answered without: a caller who repeats one command costs one look-up.
        """
        async with self._reads.connection() as connection:
            known = (await read_commands(connection, [command.key])).get(command.key)
        if known is not None and is_final(known, command):
            return outcome_again(known, command), known.epoch
        command = replace(command, content=await prepare(command.key[0], command.content))
        [[outcome]] = await self._committer.submit([[command]])
        return outcome, self._committer.epoch

    async def send_packed(self, packed: Packed) -> command_pb2.CommandReceipt:
        """Carries out one packed command; raises the Refusal if it is refused."""
        _, request = self._unpack(packed, within="command.")
        annotate(command_id=request.options.command_id)
        return await self.send(request)

    async def send_batch(self, items: Sequence[command_pb2.BatchItem], *, atomic: bool = False) -> Receipts:
        """Carries out packed commands and returns a receipt for each, in order.

        An item that is malformed or refused says so in its receipt. If the batch is atomic, that undoes all the others.
        Raises Forbidden if an item names somebody else as its sender and the caller is no process, and OverLimit or
        Unavailable if the committer takes nothing more.
        """
        caller, now = _sender(current_call.get()), self._clock()
        taken: list[Command | Refusal] = []
        with self._committer.announced(caller.tenant, len(items)):
            for nth, item in enumerate(items):
                if nth % SLICE == 0:
                    await self._turns.next(caller.tenant)
                taken.append(self._take(item, caller, now, within=f"items[{nth}]."))
        if self._kept is not None:
            expired = await self._expired([one for one in taken if isinstance(one, Command)])
            taken = [_id_expired() if isinstance(one, Command) and one.key in expired else one for one in taken]
        commands = [one for one in taken if isinstance(one, Command)]
        if atomic and len(commands) < len(taken):
            taken, commands = [one if isinstance(one, Refusal) else BatchAborted() for one in taken], []
        units = [commands] if atomic and commands else [[command] for command in commands]
        outcomes = [outcome for unit in await self._committer.submit(units) for outcome in unit]
        answered, receipts = zip(commands, outcomes, strict=True), []
        for nth, one in enumerate(taken):
            if nth % (4 * SLICE) == 0:
                await self._turns.next(caller.tenant)
            receipts.append(_refused(one) if isinstance(one, Refusal) else self._receipt(*next(answered), self._committer.epoch))
        return receipts

    async def refuse_expired(self, command: Command) -> None:
        """Raises Invalid (COMMAND_ID_EXPIRED) if the command's outcome may have been swept from the log."""
        if await self._expired([command]):
            raise _id_expired()

    async def _expired(self, commands: Sequence[Command]) -> set[CommandKey]:
        """The keys of commands whose ids are older than the log, and which it does not hold."""
        if self._kept is None:
            return set()
        oldest = self._clock() - self._kept
        old = [command.key for command in commands if made_before(command.key[1], oldest)]
        if not old:
            return set()
        async with self._reads.connection() as connection:
            return set(old) - set(await read_commands(connection, old))

    def _take(self, item: command_pb2.BatchItem, caller: Sender, now: datetime, *, within: str) -> Command | Refusal:
        """The command of an item, or why there is none. Raises Forbidden if the caller may not name such a sender."""
        sender = _sender_of_item(item, caller)
        try:
            route, request = self._unpack(item.command, within=within + "command.")
            if route.prepare is not None:
                raise Invalid("NOT_IN_A_BATCH", "this command holds a secret and is sent by itself")
            return _command(route, request, sender, now)
        except Refusal as refusal:
            return refusal

    async def send_stream(
        self, requests: AsyncIterator[command_pb2.SendStreamRequest]
    ) -> AsyncGenerator[command_pb2.CommandReceipt, None]:
        """Carries out packed commands as they come and yields their receipts in the same order.

        At most STREAM_WINDOW of them are under way at once: a client that does not read its receipts is not read from.
        Reading goes on beside answering, so a client may wait for each receipt before it sends the next command.
        """
        # What is waited for, the receipt of what was never taken, or what ends the stream.
        under_way: asyncio.Queue[PendingReply | command_pb2.CommandReceipt | Refusal | None] = asyncio.Queue()
        room = asyncio.Semaphore(STREAM_WINDOW)
        caller = _sender(current_call.get())

        async def take() -> None:
            try:
                async for request in requests:
                    await room.acquire()
                    one = self._take(request.item, caller, self._clock(), within="item.")
                    if self._kept is not None and isinstance(one, Command) and await self._expired([one]):
                        one = _id_expired()
                    under_way.put_nowait(self._committer.submit([[one]]) if isinstance(one, Command) else _refused(one))
            except Refusal as refusal:
                under_way.put_nowait(refusal)  # nothing that comes behind it may happen before it
            finally:
                under_way.put_nowait(None)

        taking = asyncio.create_task(take())
        try:
            while (entry := await under_way.get()) is not None:
                if isinstance(entry, PendingReply):
                    [[command]], [[outcome]] = entry.asked, await entry
                    yield self._receipt(command, outcome, self._committer.epoch)
                elif isinstance(entry, Refusal):
                    raise entry
                else:
                    yield entry
                room.release()
            await taking  # raises the defect that ended it, if one did
        finally:
            taking.cancel()
            await asyncio.gather(taking, return_exceptions=True)

    def _unpack(self, packed: Packed, *, within: str) -> tuple[Route, Any]:
        """Where the request inside goes, and the request, held to the rules of its fields."""
        route = self._committer.registry.route(packed.type_url.rpartition("/")[2])
        if route is None:
            raise _bad("UNKNOWN_COMMAND", "no command has this type", within + "type_url", "must name a command")
        value = packed.value
        if len(value) > self._size_max:
            text = f"the command has {len(value)} bytes, {self._size_max} are allowed"
            raise OverLimit("MESSAGE_TOO_LARGE", text, size=len(value), size_max=self._size_max)
        try:
            request = route.codec.message.FromString(value)
        except DecodeError:
            raise _bad("MALFORMED_MESSAGE", "the command cannot be read", within + "value", "malformed") from None
        refuse_invalid(request, within=within)
        return route, request

    def _token(self, head: int, epoch: str) -> str:
        """The caller's token of a head, of which all outcomes of one batch have the same."""
        tenant = current_call.get().identity.tenant
        if self._newest_head != (head, epoch):
            self._newest_head, self._newest_tokens = (head, epoch), {}
        token = self._newest_tokens.get(tenant)
        if token is None:
            place = Token(self._committer.shard, epoch, head)
            token = self._newest_tokens[tenant] = encode(place, self._seal, tenant)
        return token

    def _receipt(self, command: Command, outcome: Outcome, epoch: str) -> command_pb2.CommandReceipt:
        _, category, aggregate_id = command.aggregate
        receipt = command_pb2.CommandReceipt(
            command_id=command.key[1],
            status=STATUSES[outcome.status],
            aggregate_type=category,
            aggregate_id=aggregate_id,
            version=outcome.version,
            events_appended=outcome.events_appended,
            position=seen_position(outcome.position),
            consistency_token=self._token(outcome.head, epoch),
        )
        if outcome.refusal is not None:
            receipt.error.CopyFrom(to_status(outcome.refusal))
        return receipt

    def command(self, packed: Packed, *, within: str) -> Command:
        """The current caller's command that is packed inside, valid and allowed. Raises Invalid, OverLimit or Forbidden."""
        route, request = self._unpack(packed, within=within)
        annotate(command_id=request.options.command_id)
        return _command(route, request, _sender(current_call.get()), self._clock())

    def receipt(self, row: StoredCommand) -> command_pb2.CommandReceipt:
        """The receipt of a command in the log."""
        return command_pb2.CommandReceipt(
            command_id=row.command_id,
            status=STATUSES[row.status],
            aggregate_type=row.category,
            aggregate_id=row.aggregate_id,
            version=row.version,
            events_appended=row.events_appended,
            position=seen_position(row.position),
            consistency_token=self._token(row.head, row.epoch),
            error=status_pb2.Status.FromString(row.error) if row.error else None,
        )

    def record(self, row: StoredCommand) -> command_pb2.CommandRecord:
        """A row of the command log as clients see it."""
        return command_pb2.CommandRecord(
            receipt=self.receipt(row),
            command=Packed(type_url=f"type.googleapis.com/{row.type}", value=row.payload),
            user_id=row.user_id,
            on_behalf_of=row.on_behalf_of,
            correlation_id=row.correlation_id,
            causation_id=row.causation_id or "",
            traceparent=row.traceparent,
            received_at=timestamp(row.received_at),
            finished_at=timestamp(row.finished_at) if row.finished_at else None,
            tenant=row.tenant,
            due_at=timestamp(row.due_at) if row.due_at else None,
            waited_us=_waited_us(row),
            decided_us=row.decided_us,
            trace_id=trace_id(row.traceparent),
        )


def _waited_us(row: StoredCommand) -> int:
    """From when the command could be decided until its outcome was durable, without deciding; 0 if it has none yet."""
    if row.finished_at is None:
        return 0
    began = max(row.received_at, row.due_at) if row.due_at else row.received_at
    return max((row.finished_at - began) // timedelta(microseconds=1) - row.decided_us, 0)


def command_of(route: Route, request: Any, now: datetime) -> Command:
    """The current caller's command of a valid request. Raises Forbidden or Invalid."""
    annotate(command_id=request.options.command_id)
    return _command(route, request, _sender(current_call.get()), now)


def _command(route: Route, request: Any, sender: Sender, now: datetime) -> Command:
    """The command of a valid request.

    What is stored, and told apart from other commands under the same id, is what was decoded: never a field of a newer
    contract, which may be a secret, nor a secret of ours.
    """
    if route.roles.isdisjoint(sender.roles):
        # Checked here and not by the RPC alone, because any command can also come packed.
        needed = ", ".join(sorted(route.roles))
        raise Forbidden("ROLE_MISSING", f"this needs one of the roles: {needed}", roles=needed)
    options = request.options
    command_id = options.command_id.lower()
    if is_of_processes(command_id) and Role.PROCESS not in sender.roles:
        raise _bad(
            "COMMAND_ID_RESERVED", "ids of this kind are kept for processes", "options.command_id", "must not be of version 8"
        )
    expected_version = options.expected_version if options.HasField("expected_version") else None
    correlation_id = options.correlation_id.lower() or command_id
    content = route.codec.decode(request)
    return Command(
        key=(sender.tenant, command_id),
        route=route,
        aggregate=(sender.tenant, route.aggregate.category, route.id(content)),
        content=content,
        payload=route.codec.encode_shown(content),
        expected_version=expected_version,
        correlation_id=correlation_id,
        sender=sender,
        received_at=now,
    )


def _sender(call: Call) -> Sender:
    identity = call.identity
    return Sender(identity.tenant, identity.user_id, "", identity.roles, None, call.traceparent)


def _sender_of_item(item: command_pb2.BatchItem, sender: Sender) -> Sender:
    """The sender that a batch item names: only a process may name another than itself."""
    if not (item.tenant or item.on_behalf_of or item.causation_id or item.traceparent):
        return sender
    if Role.PROCESS not in sender.roles:
        text = "only a process may set tenant, on_behalf_of, causation_id or traceparent"
        raise Forbidden("ROLE_MISSING", text, role=Role.PROCESS)
    return Sender(
        tenant=item.tenant or sender.tenant,
        user_id=sender.user_id,
        on_behalf_of=item.on_behalf_of,
        roles=sender.roles,
        causation_id=item.causation_id.lower() or None,
        traceparent=valid_traceparent(item.traceparent) or sender.traceparent,
    )


def _refused(refusal: Refusal) -> command_pb2.CommandReceipt:
    """The receipt of an item that was never taken."""
    return command_pb2.CommandReceipt(status=command_pb2.COMMAND_STATUS_REJECTED, error=to_status(refusal))


def _id_expired() -> Invalid:
    return Invalid("COMMAND_ID_EXPIRED", "this command id is older than what the command log keeps: its outcome may be gone")


def _bad(reason: str, text: str, field: str, description: str) -> Invalid:
    return Invalid(reason, text, violations=((field, description),))

"""What is saved of processes: the rows of their tables as tuples, and the answers and failures of their commands."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import NamedTuple
from uuid import UUID

from google.rpc import status_pb2

ProcessKey = tuple[str, str, str]
"""Names a process: tenant, type, id."""

FOLD_FAILED = "FOLD_FAILED"
COMMAND_FAILED = "COMMAND_FAILED"
# For an hour no write service knew the command, or a field of it.
COMMAND_UNKNOWN = "COMMAND_UNKNOWN"
# A step that its process cannot do without was refused.
COMMAND_REFUSED = "COMMAND_REFUSED"


class ProcessStatus(StrEnum):
    """Whether a process goes on by itself."""

    RUNNING = "running"
    ENDED = "ended"
    PARKED = "parked"
    # The event that began it is no longer in the line (a restore). The process begins anew if that event comes again.
    UNDONE = "undone"


@dataclass(slots=True)
class Process:
    """A process; the fields are the row's columns, in their order."""

    tenant: str
    type: str
    process_id: str
    state: str
    schema: int
    status: str
    # Why the runner parked it; empty if it is not parked.
    trouble: str
    # Why an operator should look at it, in the process's own words.
    attention: str
    phase: str
    correlation_id: str
    # The event that moved it last.
    causation_id: str
    on_behalf_of: str
    traceparent: str
    # The attempt of each step that has had more than one, as JSON.
    attempts: str
    # How many lines its history has.
    entries: int
    started_at: datetime
    moved_at: datetime

    @property
    def key(self) -> ProcessKey:
        """Its name."""
        return self.tenant, self.type, self.process_id


class PendingCommand(NamedTuple):
    """A command that was sent, or will be, and has no answer yet."""

    tenant: str
    type: str
    process_id: str
    step: str
    attempt: int
    command_id: UUID
    command_type: str
    # The request with its options.
    payload: bytes
    causation_id: str
    on_behalf_of: str
    traceparent: str
    # How often it was given to the dispatcher, this time included, and how often the write service failed on it.
    tries: int
    failures: int

    @property
    def key(self) -> ProcessKey:
        """The process it belongs to."""
        return self.tenant, self.type, self.process_id


class CommandResult(NamedTuple):
    """The final answer to a command: accepted if there is no error."""

    command: PendingCommand
    error: status_pb2.Status | None
    reason: str


class CommandIdTaken(NamedTuple):
    """The log holds a client's command under this command's id, so this command was never carried out by any try.

    Only an id that an earlier release made, which is not of version 8, can be taken.
    """

    command: PendingCommand


class DeliveryFailure(NamedTuple):
    """A try to send a command that brought no final answer."""

    command: PendingCommand
    error: str
    # True if this try certainly did not carry the command out.
    undone: bool
    # True if the write service failed on it (INTERNAL), rather than was away for a while.
    failed: bool
    # Why the command is not tried again, COMMAND_FAILED or COMMAND_UNKNOWN; empty if it is tried again at `due_at`.
    given_up: str
    due_at: datetime


class HistoryEntry(NamedTuple):
    """A line of a process's history; the fields are the row's columns, in their order."""

    tenant: str
    type: str
    process_id: str
    number: int
    happened_at: datetime
    kind: str
    name: str
    step: str
    id: str
    position: int
    attempts: int
    error: bytes | None
    phase: str
    # What an operator said.
    note: str


class DueTimer(NamedTuple):
    """A timer; the fields are the row's columns."""

    tenant: str
    type: str
    process_id: str
    name: str
    due_at: datetime

    @property
    def key(self) -> ProcessKey:
        """The process it belongs to."""
        return self.tenant, self.type, self.process_id


class WaitingInput(NamedTuple):
    """An input that waits until its parked process goes on; the fields are the row's columns, in their order."""

    tenant: str
    type: str
    process_id: str
    kind: str
    name: str
    content: bytes

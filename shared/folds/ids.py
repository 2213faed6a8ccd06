"""Derived ids: an id is computed from the thing that it names, so every program computes the same id for the same thing.

The ids of commands that processes, schedules and rules of retention send are UUIDs of version 8. The write service refuses such a
command id from a caller without role `process`. Anybody can compute the id of a step from public ids, but nobody else can use it
before the process does.
"""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from uuid import UUID, uuid5


def step_id(process_type: str, process_id: str, step: str, attempt: int = 1) -> UUID:
    """The id of a step's command. It is the same when the step is sent again after a crash, or by two instances at once.

    It depends on the type, because a tenant may use the same id for processes of two types. Raises ValueError if the
    process's id is no UUID, or for an attempt below 1.
    """
    if attempt < 1:
        raise ValueError(f"attempts are numbered from 1, not {attempt}")
    return _version_8(UUID(process_id).bytes + f"{process_type}/{step}/{attempt}".encode())


def firing_id(schedule_id: str, due_at: datetime) -> str:
    """The command id of a schedule's firing. It is in the space of `step_id`, so that nobody uses it before the firing does."""
    return str(_version_8(UUID(schedule_id).bytes + f"firing/{due_at.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}".encode()))


def reserved_id(*parts: str) -> str:
    """As `derived_id`, in the space of `step_id`: for commands of the write service itself, which no caller may use before."""
    return str(_version_8("".join(f"{len(part)}:{part}" for part in parts).encode()))


def _version_8(content: bytes) -> UUID:
    number = int.from_bytes(hashlib.sha256(content).digest()[:16])
    # RFC 9562, version 8: all bits but those of version and variant are ours to choose.
    number = number & ~(0xF << 76) | 8 << 76
    return UUID(int=number & ~(0x3 << 62) | 2 << 62)


def is_of_processes(command_id: str) -> bool:
    """Whether a UUID, in its canonical form, is in the space of `step_id`."""
    return command_id[14] == "8"


def derived_id(*parts: str) -> str:
    """The id that is derived from the parts, in this order.

    Each part is preceded by its length, so ("a", "bc") and ("ab", "c") give different ids.
    """
    return str(uuid5(_DERIVED, "".join(f"{len(part)}:{part}" for part in parts)))


_DERIVED = UUID("b1f0c7de-52a5-5b4f-8f0e-3c8f5a2d9e61")

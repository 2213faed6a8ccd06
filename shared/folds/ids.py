"""Ids that follow from what they name, so that the same command or aggregate is named alike by every process that asks.

The ids of processes' commands are UUIDs of version 8, a space that nobody else may write: the write service refuses such
a command id from a caller without role `process`. So nobody can take the id of a step beforehand, which anybody could
compute from public ids.
"""

from __future__ import annotations

import hashlib
from uuid import UUID, uuid5


def step_id(process_type: str, process_id: str, step: str, attempt: int = 1) -> UUID:
    """The id of the command of a step. A step that is sent again, after a crash or by two at once, has the same id.

    The type counts because a tenant may give processes of two types the same id. Raises ValueError if the process's
    id is no UUID, or for an attempt below 1.
    """
    if attempt < 1:
        raise ValueError(f"attempts are numbered from 1, not {attempt}")
    digest = hashlib.sha256(UUID(process_id).bytes + f"{process_type}/{step}/{attempt}".encode()).digest()
    number = int.from_bytes(digest[:16])
    # RFC 9562, version 8: what the version and the variant leave is ours to fill.
    number = number & ~(0xF << 76) | 8 << 76
    return UUID(int=number & ~(0x3 << 62) | 2 << 62)


def is_of_processes(command_id: str) -> bool:
    """Whether a UUID, in its canonical form, is in the space of `step_id`."""
    return command_id[14] == "8"


def derived_id(*parts: str) -> str:
    """An id that follows from its parts, in this order: the same for everybody who asks, another for other parts.

    Each part stands behind its length, so that ("a", "bc") and ("ab", "c") are told apart.
    """
    return str(uuid5(_DERIVED, "".join(f"{len(part)}:{part}" for part in parts)))


_DERIVED = UUID("b1f0c7de-52a5-5b4f-8f0e-3c8f5a2d9e61")

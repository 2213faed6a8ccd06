"""The ids of a process's commands: they follow from the process (its type and its id), the step and the attempt.

So whoever sends a step again, after a crash or beside another, sends it under the same id, and the write service
carries it out once. The first event of a process fixes the ids of its later steps with the same function.
"""

from __future__ import annotations

from uuid import UUID, uuid5


def step_id(process_type: str, process_id: str, step: str, attempt: int = 1) -> UUID:
    """The id of the command of a step.

    The type counts because a tenant may give processes of two types the same id. Raises ValueError if the process's
    id is no UUID, or for an attempt below 1.
    """
    if attempt < 1:
        raise ValueError(f"attempts are numbered from 1, not {attempt}")
    return uuid5(UUID(process_id), f"{process_type}/{step}/{attempt}")


def derived_id(*parts: str) -> str:
    """An id that follows from its parts, in this order: the same for everybody who asks, another for other parts.

    Each part stands behind its length, so that ("a", "bc") and ("ab", "c") are told apart.
    """
    return str(uuid5(_DERIVED, "".join(f"{len(part)}:{part}" for part in parts)))


_DERIVED = UUID("b1f0c7de-52a5-5b4f-8f0e-3c8f5a2d9e61")

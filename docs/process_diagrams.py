"""The state diagrams of docs/processes.md, drawn from the folds themselves: every answer is tried in every phase."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from google.protobuf.message import Message

from bank.v1 import transfer_pb2, user_pb2
from foldline.v1.event_store_pb2 import EventEnvelope
from saga_service.registry import PROCESSES
from shared.folds.process import ProcessDefinition
from shared.processes.compatibility import Arrow, explore
from shared.processes.process_type import ProcessType

BEGUN: dict[str, Message] = {
    "transfer": transfer_pb2.TransferStarted(transfer_id="T", from_account_id="A", to_account_id="B", amount_minor=1),
    "registration": user_pb2.UserRegistrationStarted(user_id="U", login_id="L"),
}
"""An event that begins each type of process."""


def arrows(definition: ProcessDefinition[Any]) -> tuple[str, Sequence[Arrow]]:
    """The first phase, and all transitions."""
    begun = definition.react(definition.initial, BEGUN[definition.type], EventEnvelope())
    assert begun is not None, f"{definition.type} does not begin with its event"
    return definition.phase(begun.state), explore(ProcessType(definition), begun)


def page() -> str:
    """docs/processes.md."""
    lines = [
        "# Processes",
        "",
        "What the saga service runs. A process goes from phase to phase with the answers to its commands; the label of an arrow",
        "is the step and its answer. A mandatory step has no refusal: if it is refused, the process is parked, and an operator",
        "lets it be sent again. `foldline process show TYPE ID` prints the path that one took, with the time of each phase.",
        "",
        "This page is generated from the definitions in `saga_service/registry.py` by `make docs`.",
    ]
    for definition in PROCESSES:
        first, found = arrows(definition)
        event = type(BEGUN[definition.type]).DESCRIPTOR.name
        lines += ["", f"## {definition.type}", ""]
        lines += [
            f"Mandatory steps: {_names(definition.mandatory)}. Steps that an operator may skip: {_names(definition.skippable)}."
        ]
        lines += ["", "```mermaid", "stateDiagram-v2", f"  [*] --> {first}: {event}"]
        lines += [f"  {arrow.source} --> {arrow.target}: {arrow.label}" for arrow in found]
        lines += [f"  {target} --> [*]" for target in dict.fromkeys(arrow.target for arrow in found if arrow.ends)]
        lines += ["```"]
    return "\n".join(lines) + "\n"


def _names(steps: frozenset[str]) -> str:
    return ", ".join(f"`{step}`" for step in sorted(steps)) or "none"

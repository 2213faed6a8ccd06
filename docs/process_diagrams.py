"""The state diagrams of docs/processes.md, drawn from the folds themselves (`shared/processes/diagram.py`)."""

from __future__ import annotations

from saga_service.registry import PROCESSES
from shared.processes.diagram import explore
from shared.processes.process_type import ProcessType


def page() -> str:
    """docs/processes.md."""
    lines = [
        "# Processes",
        "",
        "What the saga service runs. A process goes from phase to phase with the answers to its commands; the label of an arrow",
        "is the step and its answer. A mandatory step has no refusal: if it is refused, the process is parked, and an operator",
        "lets it be sent again. `foldline process show ID` draws the same diagram with the path that one process took, and when.",
        "",
        "This page is generated from the definitions in `saga_service/registry.py` by `make docs`.",
    ]
    for definition in PROCESSES:
        found = explore(ProcessType(definition)).arrows
        lines += ["", f"## {definition.type}", ""]
        lines += [
            f"Mandatory steps: {_names(definition.mandatory)}. Steps that an operator may skip: {_names(definition.skippable)}."
        ]
        lines += ["", "```mermaid", "stateDiagram-v2"]
        lines += [f"  {arrow.source or '[*]'} --> {arrow.target}: {arrow.label}" for arrow in found]
        lines += [f"  {target} --> [*]" for target in dict.fromkeys(arrow.target for arrow in found if arrow.ends)]
        lines += ["```"]
    return "\n".join(lines) + "\n"


def _names(steps: frozenset[str]) -> str:
    return ", ".join(f"`{step}`" for step in sorted(steps)) or "none"

"""The projector, whose folds of deposits in the group `accounts` hang until the file is there that HELD_UNTIL names.

A fold that hangs takes its process's whole loop, as one does that is slow. First it makes the file PATH.held.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from bank.v1 import account_pb2
from read_service import projector
from read_service.registry import GROUPS
from shared.folds.projection import Group, Projection

HELD = "accounts"


def holding(group: Group, file: Path) -> Group:
    """The group, whose folds of a deposit wait for the file."""

    def held(projection: Projection[Any]) -> Projection[Any]:
        def waiting(fold: Any) -> Any:
            def wait(*args: Any) -> Any:
                file.with_suffix(".held").touch()
                while not file.exists():
                    time.sleep(0.01)
                return fold(*args)

            return wait

        return replace(projection, on=[
            (event, waiting(fold) if event is account_pb2.MoneyDeposited else fold) for event, fold in projection.on
        ])  # fmt: skip

    return replace(group, projections=[held(projection) for projection in group.projections])


def main() -> int:
    """Runs the projector."""
    file = Path(os.environ["HELD_UNTIL"])
    vars(projector)["GROUPS"] = tuple(holding(group, file) if group.name == HELD else group for group in GROUPS)
    return projector.main()


if __name__ == "__main__":
    sys.exit(main())

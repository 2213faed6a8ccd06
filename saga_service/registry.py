"""Which processes there are. What each reacts to and sends is in its own file."""

from __future__ import annotations

from typing import Any

from saga_service.registration import REGISTRATION
from saga_service.transfer import TRANSFER
from shared.folds.process import ProcessDefinition

PROCESSES: tuple[ProcessDefinition[Any], ...] = (TRANSFER, REGISTRATION)

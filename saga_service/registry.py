"""The types of processes. Each file says which events its process reacts to and which commands it sends."""

from __future__ import annotations

from typing import Any

from saga_service.registration import REGISTRATION
from saga_service.transfer import TRANSFER
from shared.folds.process import ProcessDefinition

PROCESSES: tuple[ProcessDefinition[Any], ...] = (TRANSFER, REGISTRATION)

"""Process types: a process definition, and how its states become JSON and come back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import orjson
from pydantic import TypeAdapter

from shared.folds.process import ProcessDefinition
from shared.folds.upcasting import NONE, Upcasters
from shared.processes.records import Process


class ProcessType:
    """A process definition with the reader and writer of its states, and the upcasters of the events that it reacts to."""

    def __init__(self, manager: ProcessDefinition[Any], upcasters: Upcasters = NONE) -> None:
        self.manager = manager
        self.upcasters = upcasters
        self._adapter: TypeAdapter[Any] = TypeAdapter(type(manager.initial))

    def load(self, process: Process) -> Any:
        """The state of a process, migrated to the schema of this release.

        Raises ValueError if a newer release wrote it or it cannot be read, and whatever a migration raises.
        """
        if not process.state:
            return self.manager.initial
        schema, wanted = process.schema, self.manager.schema
        if schema == wanted:
            return self._adapter.validate_json(process.state)
        if schema > wanted:
            raise ValueError(f"a state of schema {schema}, this release knows {wanted}")
        fields = orjson.loads(process.state)
        for number in range(schema, wanted):
            if (migrate := self.manager.migrations.get(number)) is not None:
                fields = migrate(fields)
        return self._adapter.validate_json(orjson.dumps(fields))

    def dump(self, state: Any) -> str:
        """The state as JSON. Raises TypeError or ValueError if a field does not hold what its class declares."""
        if type(state) is not type(self.manager.initial):
            raise TypeError(f"a state of {self.manager.type} is a {type(self.manager.initial).__name__}")
        return self._adapter.dump_json(state, warnings="error").decode()


def process_types(managers: Iterable[ProcessDefinition[Any]], upcasters: Upcasters = NONE) -> dict[str, ProcessType]:
    """Process types by name. Raises TypeError for a name that is given twice."""
    kinds: dict[str, ProcessType] = {}
    for manager in managers:
        if manager.type in kinds:
            raise TypeError(f"the process {manager.type} is registered twice")
        kinds[manager.type] = ProcessType(manager, upcasters)
    return kinds

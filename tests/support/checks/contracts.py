"""The modules of all contracts, found by their files: a list by hand would miss the next one."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

PROTOS = Path(__file__).parents[3] / "protos"


def contracts(package: str) -> tuple[ModuleType, ...]:
    """The generated modules of a package, as `bank/v1`, in the order of their names."""
    return tuple(
        import_module(f"{package.replace('/', '.')}.{path.stem}_pb2") for path in sorted((PROTOS / package).glob("*.proto"))
    )

"""The names of the summaries that `.proto` files declare, as the text of a Python module for the command line.

The command line has a command for each, and reads no contract before one runs, for that takes longer than its start may.
"""

from __future__ import annotations

import re

from domain_code import NOTICE
from google.protobuf.descriptor_pb2 import FileDescriptorSet, ServiceDescriptorProto


def summary_names(described: FileDescriptorSet, prefix: str) -> str:
    """The module, for the files whose names begin with `prefix`."""
    services = [service for file in described.file if file.name.startswith(prefix) for service in file.service]
    names = sorted(name for service in services for name in _shown(service))
    return f'"""The summaries of the contracts, which the read service shows. {NOTICE}"""\n\nSUMMARIES = {tuple(names)}\n'


def _shown(service: ServiceDescriptorProto) -> list[str]:
    """The summaries of a service: what it has a Get, an Explain, a List and two Watch RPCs of."""
    rpcs = {method.name for method in service.method}
    kinds = [name.removeprefix("Explain") for name in rpcs if name.startswith("Explain")]
    wanted = ("Get{}", "List{}s", "Watch{}", "Watch{}s")
    return [re.sub(r"(?<!^)(?=[A-Z])", "_", kind).lower() for kind in kinds if rpcs.issuperset(it.format(kind) for it in wanted)]

"""The refusals that the code can raise, read from its source: what docs/refusals.md says and a test holds to docstrings.

A decision's docstring names its refusals in order of precedence. `refusals_of` finds the same list in the source: what
the function raises, from top to bottom, and where it calls a function of the domain what that raises.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.commands.registry import CommandRegistry
from shared.folds import errors
from shared.folds.errors import Refusal

ROOT = Path(__file__).resolve().parent.parent
CODE = ("shared", "write_service", "read_service", "saga_service")

_REASON = re.compile(r"\b[A-Z]+(?:_[A-Z]+)+\b")
_CLASSES = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and hasattr(kind, "code")}


@dataclass(frozen=True, slots=True)
class Raised:
    """A refusal as one place in the source raises it: its reason, its code's name, and its text with … for what varies."""

    reason: str
    code: str
    text: str


def documented(function: Any) -> list[str]:
    """The reasons that a docstring names after the word "Refusals", in its order."""
    return named(inspect.getdoc(function) or "")


def named(text: str) -> list[str]:
    """The reasons that a text names after the word "Refusals", in its order."""
    return _REASON.findall(text.partition("Refusals")[2])


def refusals_of(decide: Callable[..., Any]) -> list[Raised]:
    """What a decision refuses, in order of precedence."""
    found = [each for each in _walk(decide, set()) if isinstance(each, Raised)]
    return list({each.reason: each for each in found}.values())


def refusals_of_command(registry: CommandRegistry, type_name: str) -> list[Raised]:
    """What a command can be refused for: by its decision, then by the reactions to the events that the decision makes."""
    route = registry.route(type_name)
    assert route is not None
    found: list[Raised] = []
    functions, seen = [route.decide], set[Any]()
    while functions:
        decide = functions.pop(0)
        if decide in seen:
            continue
        seen.add(decide)
        steps = list(_walk(decide, set()))
        found += [step for step in steps if isinstance(step, Raised)]
        made = [step for step in steps if isinstance(step, type)]
        functions += [reaction.decide for event in made for reaction in registry.reactions_by_event.get(event, ())]
    return list({each.reason: each for each in found}.values())


def decisions(registry: CommandRegistry) -> dict[str, Callable[..., Any]]:
    """Every decision and reaction of a registry, by its full name."""
    routes = [registry.route(name) for name in registry.commands()]
    found = [route.decide for route in routes if route is not None]
    found += [own.decide for route in routes if route is not None for own in route.overrides.values()]
    found += [reaction.decide for reactions in registry.reactions_by_event.values() for reaction in reactions]
    return {f"{decide.__module__}.{decide.__qualname__}": decide for decide in found}


def all_refusals() -> dict[str, dict[Raised, list[str]]]:
    """Every refusal in the source by its reason, each with the files that raise it."""
    found: dict[str, dict[Raised, list[str]]] = {}
    for folder in CODE:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            for raised in _in_module(ast.parse(path.read_text())):
                files = found.setdefault(raised.reason, {}).setdefault(raised, [])
                if name not in files:
                    files.append(name)
    return dict(sorted(found.items()))


def _walk(function: Callable[..., Any], seen: set[Any]) -> Iterator[Raised | type]:
    """What a function raises and which structs it makes, in the order of its source, through functions of its package."""
    seen.add(function)
    package = function.__module__.rpartition(".")[0]
    names = vars(sys.modules[function.__module__])
    for call in _calls(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        target = names.get(call.func.id) if isinstance(call.func, ast.Name) else None
        if isinstance(target, type) and issubclass(target, Refusal):
            yield from _raised(call, target, names)
        elif isinstance(target, type):
            yield target
        elif inspect.isfunction(target) and target not in seen and target.__module__.rpartition(".")[0] == package:
            yield from _walk(target, seen)


def _calls(node: ast.AST) -> Iterator[ast.Call]:
    """The calls below a node, in the order of the source."""
    if isinstance(node, ast.Call):
        yield node
    for child in ast.iter_child_nodes(node):
        yield from _calls(child)


def _in_module(module: ast.Module) -> Iterator[Raised]:
    """The refusals that a module makes: of a class, by a function that returns one, or in a class's own constructor."""
    makers = {name: name for name in _CLASSES}
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef) and isinstance(node.returns, ast.Name) and node.returns.id in _CLASSES:
            makers[node.name] = node.returns.id
    constants = {
        node.targets[0].id: node.value.value
        for node in module.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Constant)
    }
    for node in module.body:
        own = node.name if isinstance(node, ast.ClassDef) and node.name in _CLASSES else ""
        for call in _calls(node):
            is_own = bool(own) and isinstance(call.func, ast.Attribute) and call.func.attr == "__init__"
            maker = own if is_own else makers.get(call.func.id, "") if isinstance(call.func, ast.Name) else ""
            if maker:
                yield from _raised(call, _CLASSES[maker], constants)


def _raised(call: ast.Call, kind: type[Refusal], names: dict[str, Any]) -> Iterator[Raised]:
    match call.args:
        case [ast.Constant(value=str(reason)), *rest] if reason.isupper():
            yield Raised(reason, kind.code.name, _text(rest[0], names) if rest else "")


def _text(node: ast.expr, names: dict[str, Any]) -> str:
    """The text of a literal; of an f-string with its constants in place, and … for everything else that is put in."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(_text(value, names) for value in values)
        case ast.FormattedValue(value=ast.Name(id=name)) if name.isupper() and name in names:
            return str(names[name])
        case _:
            return "…"


def page(registry: CommandRegistry, rpcs: dict[str, str]) -> str:
    """docs/refusals.md, given the registry and the command that each RPC sends."""
    by_command = {type_name: rpc for rpc, type_name in rpcs.items()}
    lines = [
        "# Refusals",
        "",
        "A refusal has a gRPC code and a reason. Clients branch on the reason, which is stable: it stands in the",
        "`google.rpc.ErrorInfo` of the status, and in the receipt of a command of a batch. The text is for people and may",
        "change.",
        "",
        "This page is generated from the decisions and their docstrings by `make docs`.",
        "",
        "## Commands",
        "",
        "The refusals of each command in order of precedence: those of its decision, then those of the reactions in its",
        "transaction. What any call can be refused for (roles, size, fields, command id, version, load) is in the table below.",
        "",
        "| command | RPC | roles | refusals |",
        "|---|---|---|---|",
    ]
    for type_name in registry.commands():
        route = registry.route(type_name)
        assert route is not None
        rpc = by_command.get(type_name, "").rpartition(".")[2]
        reasons = ", ".join(f"`{each.reason}`" for each in refusals_of_command(registry, type_name))
        roles = ", ".join(sorted(route.roles))
        lines.append(f"| `{type_name}` | {f'`{rpc}`' if rpc else 'none: packed only'} | {roles} | {reasons or 'none'} |")
    lines += ["", *_overrides(registry)]
    lines += ["", "## All reasons", "", "| reason | code | text | where |", "|---|---|---|---|"]
    for reason, places in all_refusals().items():
        texts: dict[tuple[str, str], list[str]] = {}
        for raised, files in places.items():
            texts.setdefault((raised.code, raised.text), []).extend(files)
        for (code, text), files in texts.items():
            lines.append(f"| `{reason}` | {code} | {text.replace('|', '/')} | {', '.join(f'`{file}`' for file in files)} |")
    return "\n".join(lines) + "\n"


def _overrides(registry: CommandRegistry) -> Iterator[str]:
    yield "## Overrides"
    yield ""
    yield "What single tenants are refused besides, while the override is on (`foldline overrides`)."
    yield ""
    yield "| tenant | override | command or event | refusals |"
    yield "|---|---|---|---|"
    rows = [
        (tenant, own.name, type_name, own.decide)
        for type_name, route in registry.routes.items()
        for tenant, own in route.overrides.items()
    ]
    rows += [
        (reaction.tenant, reaction.name, event.__name__, reaction.decide)
        for event, reactions in registry.reactions_by_event.items()
        for reaction in reactions
        if reaction.tenant is not None
    ]
    for tenant, name, what, decide in sorted(rows, key=lambda row: row[:3]):
        reasons = ", ".join(f"`{each.reason}`" for each in refusals_of(decide))
        yield f"| {tenant} | `{name}` | `{what}` | {reasons or 'none'} |"

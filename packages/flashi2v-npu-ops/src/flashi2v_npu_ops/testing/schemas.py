"""Schemas of torch_npu's operators: what is loaded, what another version has, and stand-ins that run under one."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

_library: list[torch.library.Library] = []  # what is defined in it lives as long as it


def schema_faults(known: Iterable[str]) -> list[str]:
    """Compare the operators of the torch_npu that is loaded with schemas that are known, "name(Tensor x, ...) -> ...".

    Returns:
        one line for each that is missing or differs.
    """
    faults = []
    for line in known:
        expected = torch._C.parse_schema(line)
        operator = getattr(torch.ops.npu, expected.name, None)
        if operator is None:
            faults.append(f"{expected.name} is missing")
            continue
        loaded = str(operator.default._schema).removeprefix("npu::")
        if str(torch._C.parse_schema(loaded)) != str(expected):
            faults.append(f"{expected.name} is {loaded}")
    return faults


def breaking_changes(old: str, new: str) -> list[str]:
    """Return why calls that fit a schema may not fit another one; nothing: whatever fits the old one fits the new."""
    before, after = torch._C.parse_schema(old), torch._C.parse_schema(new)
    changes = []
    if before.name != after.name:
        changes.append(f"{before.name} became {after.name}")
    for index, argument in enumerate(before.arguments):
        if index >= len(after.arguments):
            changes.append(f"argument {argument.name} is gone")
        elif _traits(argument) != _traits(after.arguments[index]):
            changes.append(f"argument {argument.name} differs in name, type or default")
    added = after.arguments[len(before.arguments) :]
    changes += [f"argument {new.name} is new and has no default" for new in added if not new.has_default_value()]
    if [str(result.type) for result in before.returns] != [str(result.type) for result in after.returns]:
        changes.append("results differ")
    return changes


def _traits(argument: Any) -> tuple[Any, ...]:
    return argument.name, str(argument.type), argument.default_value, argument.kwarg_only


def emulate(schema: str, function: Callable[..., Any]) -> None:
    """Let a function stand for `torch.ops.npu.NAME`, on the CPU and wherever else its own operators run.

    It is called as the schema says, so a wrong name of an argument fails as it would on an NPU; autograd sees the plain
    operators inside. Not in a process that has loaded torch_npu, whose names these are.
    """
    if not _library:
        _library.append(torch.library.Library("npu", "FRAGMENT"))
    _library[0].define(schema)
    _library[0].impl(torch._C.parse_schema(schema).name, function, "CompositeImplicitAutograd")

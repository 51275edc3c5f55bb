"""What reached torch_npu's operators: recorded in a form that can be compared, and printed as JSON."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Call:
    """A call of an operator.

    Attributes:
        operator: its name, without the namespace.
        arguments: those that were given, by their names in the schema; tensors as `describe` has them.
    """

    operator: str
    arguments: dict[str, Any]


class Recorder(TorchDispatchMode):
    """A context that notes the operators of torch_npu (npu::) that run in it, forward and backward.

    Args:
        also: names of further operators to note, of any namespace.

    Attributes:
        calls: what ran, in order.
    """

    def __init__(self, *also: str) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._also = also

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "npu" or func._opname in self._also:
            given = dict(zip((argument.name for argument in func._schema.arguments), args)) | kwargs
            self.calls.append(Call(func._opname, {name: describe(value) for name, value in given.items()}))
        return func(*args, **kwargs)


def describe(value: Any) -> Any:
    """Return a tensor's shape, dtype and device; anything else as it is."""
    if isinstance(value, torch.Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch."), "on": value.device.type}
    return value

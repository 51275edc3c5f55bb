"""Tables that depend on sizes alone, computed once."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def computed_once(maxsize: int) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Return a decorator that keeps what a function made of its last arguments, as `functools.lru_cache` does.

    While a graph is traced or exported tensors have no numbers: what is made then is not kept.

    Args:
        maxsize: tables that are kept.
    """

    def decorate(make: Callable[..., T]) -> Callable[..., T]:
        kept = lru_cache(maxsize)(make)

        @wraps(kept)
        def table(*args: object) -> T:
            # The type of a new tensor tells of every mode that makes tensors without numbers.
            is_traced = torch.compiler.is_compiling() or type(torch.empty(0)) is not Tensor
            return make(*args) if is_traced else kept(*args)

        return table

    return decorate

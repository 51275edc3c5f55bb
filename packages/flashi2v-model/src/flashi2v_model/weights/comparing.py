"""What keeps weights from fitting a model, told in one line that leaves out no key."""

import re
from collections.abc import Container, Iterable, Mapping

import torch
from torch import Tensor

# Smaller types mean nothing without the scales beside them, and integers are no weights of this model.
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_BLOCK = re.compile(r"(?<=\.)\d+(?=\.)")
# A whole transformer under foreign names is some forty patterns; more are the names of something else.
_MOST_PHRASES = 60


def compare(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], may_miss: Container[str] = ()) -> list[str]:
    """Return every fault of `weights` as a phrase; those of like blocks share one ("blocks.0-29.attn1.to_q.weight").

    Args:
        weights: what is given, on any device, meta included.
        expected: the model's, under the same layout's names.
        may_miss: names whose absence is no fault.
    """
    both = [(name, tensor) for name, tensor in weights.items() if name in expected]
    return fault_phrases(
        missing=[name for name in expected if name not in weights and name not in may_miss],
        unexpected=[name for name in weights if name not in expected],
        misshapen=[
            (name, tuple(tensor.shape), tuple(expected[name].shape))
            for name, tensor in both
            if tensor.shape != expected[name].shape
        ],
        mistyped=[(name, tensor.dtype) for name, tensor in both if tensor.dtype not in FLOATS],
    )


def fault_phrases(
    missing: Iterable[str] = (),
    unexpected: Iterable[str] = (),
    misshapen: Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]] = (),
    mistyped: Iterable[tuple[str, torch.dtype]] = (),
) -> list[str]:
    """Return faults as phrases, of which like ones share one.

    Args:
        missing: names that only the model has.
        unexpected: names that only the weights have.
        misshapen: names with the weights' shape and the model's.
        mistyped: names with the weights' dtype.
    """
    phrases = [("missing ", name, "") for name in missing]
    phrases += [("unexpected ", name, "") for name in unexpected]
    phrases += [("", name, f" is {given}, the model has {own}") for name, given, own in misshapen]
    phrases += [
        ("", name, f" is {str(dtype).removeprefix('torch.')}: give floats of 16 or 32 bits, not quantised weights")
        for name, dtype in mistyped
    ]
    groups: dict[tuple[str, str, str], list[int]] = {}
    for before, name, after in phrases:
        block = _BLOCK.search(name)
        numbers = groups.setdefault((before, _BLOCK.sub("#", name, count=1), after), [])
        numbers += [int(block.group())] if block else []
    told = [
        f"{before}{name.replace('#', _ranges(numbers), 1) if numbers else name}{after}"
        for (before, name, after), numbers in groups.items()
    ]
    rest = len(told) - _MOST_PHRASES
    return told if rest <= 0 else [*told[:_MOST_PHRASES], f"and {rest} more such groups of keys"]


def _ranges(numbers: list[int]) -> str:
    """Write numbers as "0-2,5"."""
    numbers = sorted(numbers)
    starts = [n for i, n in enumerate(numbers) if i == 0 or numbers[i - 1] != n - 1]
    ends = [n for i, n in enumerate(numbers) if i == len(numbers) - 1 or numbers[i + 1] != n + 1]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends))

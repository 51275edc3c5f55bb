"""What a computation costs, counted while the real functions run: peak memory and floating-point operations.

On tensors of the meta device, which have shapes and no numbers, this predicts; on real ones it measures. Both see the
same operators, so a prediction cannot drift away from the code.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, out_val: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


# PyTorch has no formula for the CPU's attention.
FORMULAS: dict[Any, Any] = {**flop_registry, _FUSED: _attention_flops}


class Trace(TorchDispatchMode):
    """Counts what is made while it is entered; what was there before (weights) is counted by `hold` alone.

    A kernel's workspace is inside of the kernel and is not seen, nor is what an allocator keeps for later.

    Attributes:
        live: bytes in tensors that are alive.
        peak: the most of them at once.
        flops: floating-point operations of products, convolutions and attention, by PyTorch's own formulas: two for
            each multiplication with its addition.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self._storages: set[int] = set()

    def hold(self, num_bytes: int) -> None:
        """Count bytes that no operator makes, such as weights; a negative number lets go of them."""
        self.live += num_bytes
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if made:
            given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            for tensor in made:
                self._watch(tensor.untyped_storage(), given)
        return result

    def _watch(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in given and key not in self._storages:
            self._storages.add(key)
            self.hold(size)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.live -= size


class _FusedAttention(TorchFunctionMode):
    """Runs attention on the meta device as the one operator that it is on the CPU; accelerators have their like.

    PyTorch thinks that there is none for this device, and would make a matrix of all pairs of tokens.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            return _attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    out: Tensor = _FUSED(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return out


@contextmanager
def tracing() -> Iterator[Trace]:
    """Count within the context, without gradients."""
    with torch.no_grad(), _FusedAttention(), Trace() as trace:
        yield trace


def num_bytes(*modules: nn.Module) -> int:
    """Return the bytes of all parameters and buffers, each counted once."""
    tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


@contextmanager
def held_while_running(trace: Trace, sizes: Mapping[nn.Module, int]) -> Iterator[None]:
    """Count bytes for each module while its forward runs: how offloading in groups holds weights."""
    with ExitStack() as stack:
        for module, size in sizes.items():
            stack.callback(module.register_forward_pre_hook(_holder(trace, size)).remove)
            stack.callback(module.register_forward_hook(_holder(trace, -size)).remove)
        yield


def _holder(trace: Trace, size: int) -> Callable[..., None]:
    return lambda *_: trace.hold(size)

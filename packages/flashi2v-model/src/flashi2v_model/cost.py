"""What a computation costs, counted while the real functions run: operations, peak memory, what autograd keeps.

On tensors of the meta device, which have shapes and no numbers, this predicts; on real ones it measures. Both see the
same operators, so a prediction cannot drift away from the code. A multiplication with its addition counts as two
operations.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from flashi2v_model.quantization import is_quantized
from flashi2v_model.transformer import EMBED_INPUTS, FlashI2VTransformer3DModel

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
        flops: floating-point operations of products, convolutions and attention, by PyTorch's own formulas.
        attention_flops: those of attention alone, as far as it is one operator.
        moved: bytes that all other operators read and write: norms, sums, copies and the like. Views move nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.flops = self.attention_flops = self.moved = 0
        self._storages: set[int] = set()

    def hold(self, num_bytes: int) -> None:
        """Count bytes that no operator makes, such as weights; a negative number releases them."""
        self.live += num_bytes
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = FORMULAS.get(func._overloadpacket)
        if formula is not None:
            flops = formula(*args, **kwargs, out_val=result)
            self.flops += flops
            self.attention_flops += flops if func._overloadpacket is _FUSED else 0
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if made:
            read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            given = {leaf.untyped_storage()._cdata for leaf in read}
            if formula is None and func.is_view is False:
                self.moved += sum(tensor.nbytes for tensor in (*read, *made))
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

    PyTorch knows none for this device, and would make a matrix of all pairs of tokens.
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
    return sum(stored.numel() * stored.element_size() for t in tensors.values() for stored in _stored(t))


def _stored(tensor: Any) -> list[Tensor]:
    """Return the plain tensors that a quantised one is stored as; any other alone."""
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]] if is_quantized(tensor) else [tensor]


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


@dataclass(frozen=True)
class Operations:
    """Operations of the forward pass of one sample.

    Attributes:
        embedding: of latent, features, shift, time and text.
        attention: of one block, the attention itself, to video and text.
        matrices: of one block, all else.
        head: the projection to the velocity.
        num_layers: number of blocks.
        moved: bytes that embedding, one block and the projection read and write beside these operations.
        frozen: with weights that are not trained, for which the backward pass has no gradients to compute.
    """

    embedding: float
    attention: float
    matrices: float
    head: float
    num_layers: int
    moved: tuple[float, float, float]
    frozen: float = 0.0

    @property
    def layer(self) -> float:
        """One block."""
        return self.attention + self.matrices

    @property
    def forward(self) -> float:
        """The whole forward pass."""
        return self.embedding + self.num_layers * self.layer + self.head

    @property
    def training(self) -> float:
        """Forward and backward pass, which takes as long for inputs and for weights; no second forward pass counts."""
        return 3 * self.forward - self.frozen


def count_operations(transformer: FlashI2VTransformer3DModel, inputs: Mapping[str, Tensor]) -> Operations:
    """Count the operations of a forward pass.

    Args:
        transformer: whole, with or without numbers.
        inputs: what its `embed` is given, by name, of one sample and on the same device.
    """
    grid, num_layers = transformer.token_grid(inputs["hidden_states"].shape), len(transformer.blocks)
    usual = [inputs[name] for name in EMBED_INPUTS]  # which a variant may take by position alone
    more = {name: tensor for name, tensor in inputs.items() if name not in EMBED_INPUTS}
    with tracing() as trace:
        x, text, time, modulation = transformer.embed(*usual, **more)
        embedding, moved = trace.flops, [trace.moved]
        x = transformer.run_blocks(x, text, modulation, grid)
        blocks = trace.flops - embedding
        moved.append(trace.moved)
        transformer.project(x, time, grid)
    attention = trace.attention_flops / num_layers
    head = trace.flops - embedding - blocks
    first, behind = moved[0], trace.moved - moved[1]
    of_parts = first, (moved[1] - first) / num_layers, behind
    return Operations(embedding, attention, blocks / num_layers - attention, head, num_layers, of_parts)


def kept_bytes(run: Callable[[], object], module: nn.Module) -> int:
    """Return the bytes that autograd keeps of a call for the backward pass.

    Args:
        run: the call.
        module: its parameters do not count.
    """
    own = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    seen: dict[int, Tensor] = {}  # storages stay alive while they are told apart

    def pack(tensor: Tensor) -> Tensor:
        seen.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), _FusedAttention():
        run()
    return sum(tensor.untyped_storage().nbytes() for key, tensor in seen.items() if key not in own)

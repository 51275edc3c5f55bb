"""An NPU made of CPU: what torch_npu's operators are asked to do, PyTorch's CPU kernels do, on the same memory.

torch_npu stays itself, over stubs of CANN (`stub_cann`): devices, streams and events, its caching allocator,
generators, autograd, views, copies of storage, HCCL's process group. Where it registers a kernel for an NPU (dispatch
key PrivateUse1), that kernel is replaced by one that sees each NPU tensor as a CPU tensor over the same bytes, runs
PyTorch's operator on those, and hands the results back as NPU tensors. Ascend's own operators (npu::) are those of
`emulations`.

What Ascend refuses is refused: fp64 and complex numbers, Conv3d in bf16, limits of the fused operators, operands on two
devices, and operators for which torch_npu has no kernel (it would run them on the CPU, slowly).
"""

import atexit
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C import _dispatch_get_registrations_for_dispatch_key as registrations
from torch._C import _dispatch_has_kernel_for_dispatch_key as has_kernel
from torch.utils._pytree import tree_map_only

from flashi2v_npu_ops.testing import emulations
from flashi2v_npu_ops.testing.emulations import RefusedError

_CPU = torch.device("cpu")
# What only moves or describes storage is torch_npu's own; views are, too.
_OWN = frozenset(
    {
        *("empty.memory_format", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "_to_copy"),
        *("resize_", "set_", "set_.source_Tensor", "is_set_to"),
        *("set_.source_Storage", "set_.source_Storage_storage_offset"),
        *("_local_scalar_dense", "record_stream", "is_pinned", "_pin_memory"),
    }
)
# Operators that take operands from the CPU beside those of an NPU: copies, and indices.
_MIXED = frozenset({"copy_", "_copy_from", "_copy_from_and_resize", "index", "index_put_", "_index_put_impl_"})
_CONVOLUTIONS = frozenset({"convolution", "_convolution", "convolution_overrideable", "convolution_backward"})
OLDER = "STUB_CANN_OLDER"  # refuse, too, what only older torch_npu refuse
RECORD = "STUB_CANN_RECORD"  # a directory in which each process leaves what its NPUs were asked for
_libraries: list[torch.library.Library] = []  # what is registered in one lives as long as it
_used: dict[str, set[str]] = {}


def operators_used() -> dict[str, list[str]]:
    """Return the operators that NPUs were asked for in this process, and the dtypes of their operands.

    They are those that reach a kernel: what PyTorch makes of others is in its parts, and views are not among them.
    Where STUB_CANN_RECORD names a directory, every process writes this there as JSON when it ends.
    """
    return {name: sorted(dtypes) for name, dtypes in sorted(_used.items())}


def _leave_record() -> None:
    if RECORD in os.environ and _used:
        path = Path(os.environ[RECORD], f"{os.getpid()}.json")
        path.write_text(json.dumps(operators_used()))


def compute_on_cpu(*, cpu_fallback: bool = False) -> None:
    """Let NPU tensors of this process be computed by the CPU. Once, after `import torch_npu` over the stubs of CANN.

    Args:
        cpu_fallback: compute operators for which torch_npu has no kernel, as torch_npu does, with its warning, instead
            of refusing them.
    """
    if _libraries:
        return
    atexit.register(_leave_record)
    aten, npu = (torch.library.Library(name, "IMPL") for name in ("aten", "npu"))
    _libraries.extend((aten, npu))
    served = {name.removeprefix("aten::") for name in registrations("PrivateUse1") if name.startswith("aten::")}
    for operator in filter(None, map(_operator, served)):
        if _name(operator) not in _OWN and not _is_view(operator):
            aten.impl(operator, _computed(operator, getattr(emulations, _name(operator), operator)), "PrivateUse1")
    if not cpu_fallback:
        for name in {
            name.removeprefix("aten::") for name in registrations("CPU") if name.startswith("aten::")
        } - served:
            operator = _operator(name)
            if operator is not None and not _is_view(operator) and not is_composite(operator):
                aten.impl(operator, _refused(operator), "PrivateUse1")
    for name, function in emulations.FUSED.items():
        operator = getattr(torch.ops.npu, name).default
        npu.impl(operator, _computed(operator, function), "PrivateUse1")
    if os.environ.get(OLDER) == "1":
        _refuse_casts_of_shards()
    # torch_npu's own calls its fused kernel from within, past the dispatcher.
    aten.impl("scaled_dot_product_attention", _attention, "AutogradPrivateUse1")


def _refuse_casts_of_shards() -> None:
    """Let `DTensor.to(dtype)` fail as under older torch_npu, which make an operator without a strategy of it."""
    from torch.distributed.tensor import DTensor

    operator = torch.ops.aten._to_copy.default
    strategies = DTensor._op_dispatcher.sharding_propagator.op_single_dim_strategy_funcs
    known = strategies[operator]

    def strategy(called: Any, args: Any, kwargs: Any) -> Any:
        if kwargs.get("dtype") not in (None, args[0].dtype):
            raise RefusedError(
                f"a cast of a sharded tensor to {kwargs['dtype']}: older torch_npu make npu._npu_dtype_cast of it, "
                "which has no sharding strategy; cast before sharding"
            )
        return known.func(called, args, kwargs)

    strategies[operator] = replace(known, func=strategy)


def _operator(name: str) -> Any:
    """Return an operator of PyTorch by its name and overload, or None: torch_npu registers some that PyTorch lacks."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)


def is_composite(operator: Any) -> bool:
    """Say whether PyTorch makes an operator of others, on devices that have no kernel for it."""
    kinds = ("ImplicitAutograd", "ExplicitAutograd", "ExplicitAutogradNonFunctional")
    return any(has_kernel(operator.name(), f"Composite{kind}") for kind in kinds)


def _name(operator: Any) -> str:
    return str(operator).removeprefix("aten.").removesuffix(".default")


def _is_view(operator: Any) -> bool:
    return any(result.alias_info is not None and not result.alias_info.is_write for result in operator._schema.returns)


def on_cpu(tensor: Tensor) -> Tensor:
    """Return an NPU tensor's numbers as a CPU tensor over the same memory. It must not outlive the NPU tensor."""
    storage = tensor.untyped_storage()
    same = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), _CPU, storage.nbytes())
    return torch.empty(0, dtype=tensor.dtype).set_(same, tensor.storage_offset(), tensor.size(), tensor.stride())


def _to_npu(tensor: Tensor, device: torch.device) -> Tensor:
    out = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
    on_cpu(out).copy_(tensor)
    return out


def _computed(operator: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the kernel that computes `function` on the CPU where `operator` was called on an NPU."""
    name = _name(operator)
    is_random = torch.Tag.nondeterministic_seeded in operator.tags
    packet, label = name.partition(".")[0], str(operator).removesuffix(".default")

    def run(*args: Any, **kwargs: Any) -> Any:
        given: list[tuple[Tensor, Tensor]] = []  # as the NPU and as the CPU sees them
        devices = set()

        def lower(tensor: Tensor) -> Tensor:
            if tensor.device.type != "npu":
                if tensor.dim() > 0 and packet not in _MIXED:
                    devices.add(tensor.device)
                return tensor
            devices.add(tensor.device)
            given.append((tensor, on_cpu(tensor)))
            return given[-1][1]

        args, kwargs = tree_map_only(Tensor, lower, (args, kwargs))
        if isinstance(kwargs.get("device"), torch.device):
            devices.add(kwargs["device"])
            kwargs["device"] = _CPU
        if len(devices) > 1:
            raise RuntimeError(f"{name}: expected all tensors to be on one device, got {sorted(map(str, devices))}")
        (device,) = devices or {torch.device("npu", torch.accelerator.current_device_index())}
        dtypes = {seen.dtype for seen, _ in given} | {*filter(None, [kwargs.get("dtype")])}
        _used.setdefault(label, set()).update(str(dtype).removeprefix("torch.") for dtype in dtypes)
        _check(packet, [seen for seen, _ in given], dtypes)
        out = _randomly(function, device, args, kwargs) if is_random else function(*args, **kwargs)
        known = {id(same): seen for seen, same in given}
        return tree_map_only(Tensor, lambda made: known[id(made)] if id(made) in known else _to_npu(made, device), out)

    return run


def _check(packet: str, tensors: list[Tensor], dtypes: set[torch.dtype]) -> None:
    """Raise a RefusedError where an Ascend device does not compute an operator of such operands."""
    bad = sorted(str(dtype) for dtype in dtypes if dtype == torch.float64 or dtype.is_complex)
    if bad:
        raise RefusedError(f"Ascend refuses {packet} in {', '.join(bad)}: make such tables on the CPU, in fp32 here")
    if packet in _CONVOLUTIONS and torch.bfloat16 in dtypes and any(tensor.dim() == 5 for tensor in tensors):
        raise RefusedError(f"Ascend refuses Conv3d in bf16 ({packet}): use flashi2v_npu_ops.conv3d, fp32 or fp16")
    if packet == "logsumexp" and torch.bfloat16 in dtypes:
        raise RefusedError("Ascend refuses logsumexp in bf16: convert to fp32")


def _randomly(function: Callable[..., Any], device: torch.device, args: Any, kwargs: Any) -> Any:
    """Draw from a CPU generator that continues the NPU's, whose state is a seed and an offset that moves on."""
    given = [part for part in (*args, *kwargs.values()) if isinstance(part, torch.Generator)]
    generator = given[0] if given else torch.get_device_module(device).default_generators[device.index]
    state = generator.get_state()  # seed and offset, 8 bytes each
    seed, offset = state.view(torch.int64)[:2].tolist()
    state.view(torch.int64)[1] = offset + 4
    generator.set_state(state)
    own = torch.Generator().manual_seed(hash((seed, offset)) & (2**63 - 1))
    if given:
        args, kwargs = tree_map_only(torch.Generator, lambda _: own, (args, kwargs))
        return function(*args, **kwargs)
    before = torch.get_rng_state()
    torch.set_rng_state(own.get_state())
    try:
        return function(*args, **kwargs)
    finally:
        torch.set_rng_state(before)


def _refused(operator: Any) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RefusedError(f"torch_npu has no kernel for {operator}: on an NPU it would run on the CPU, slowly")

    return refuse


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attend as `torch.nn.functional.scaled_dot_product_attention` says, in fp32 as fused kernels do."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scores = query.float() @ key.float().transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = torch.dropout(torch._safe_softmax(scores, -1), dropout_p, True)  # zeros where nothing is attended to
    return (weights @ value.float()).to(query.dtype)

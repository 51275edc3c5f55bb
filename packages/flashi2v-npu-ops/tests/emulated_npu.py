"""Ascend's operators as their pages describe them, on the CPU, under their real schemas.

Each emulation refuses what the page excludes, and takes what the schema takes: names and defaults of arguments are
those of the oldest torch_npu that is supported. Sources: op-plugin, custom APIs of torch_npu; facts that only the
adapter's source tells are marked.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashi2v_npu_ops.testing import emulate

SCHEMAS = json.loads(Path(__file__).with_name("npu_schemas.json").read_text())
OLDEST, NEWEST = "2.6.0", "2.13.0"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

calls: list[str] = []  # the operators that were run, in order


def _emulates(function: Any) -> Any:
    name = function.__name__
    (schema,) = (line for line in SCHEMAS[OLDEST] if line.startswith(f"{name}("))

    def run(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return function(*args, **kwargs)

    emulate(schema, run)
    return function


@_emulates
def npu_fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = 2147483647,
    next_tockens: int = 2147483647,
    inner_precise: int = 0,
    prefix: list[int] | None = None,
    actual_seq_qlen: list[int] | None = None,
    actual_seq_kvlen: list[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
    """Attend in layout BSND; a mask's True is masked OUT, by a large negative score: a full row attends to all."""
    assert input_layout == "BSND"
    batch, num_queries, num_heads, head_size = query.shape
    assert head_num == num_heads <= 256
    assert head_size <= 768
    assert query.dtype == key.dtype == value.dtype
    assert query.dtype in DTYPES
    assert (keep_prob, inner_precise, sparse_mode) == (1.0, 0, 0)
    scores = torch.einsum("bsnd,btnd->bnst", query.float(), key.float()) * scale
    if atten_mask is not None:
        full = (batch, num_heads, num_queries, key.shape[1])
        assert atten_mask.dtype in (torch.bool, torch.uint8)
        assert tuple(atten_mask.shape) in {full, (batch, 1, *full[2:]), (1, 1, *full[2:]), full[2:]}
        scores = scores.masked_fill(atten_mask.bool(), -40000.0)
    out = torch.einsum("bnst,btnd->bsnd", scores.softmax(-1), value.float()).to(query.dtype)
    statistic = scores.detach().amax(-1, keepdim=True).expand(-1, -1, -1, 8)
    return out, statistic, statistic, out.new_empty(0), 0, 0, 0


@_emulates
def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Normalise in fp32; the weight has the input's dtype, or is fp32."""
    assert input.dtype in DTYPES
    assert gamma.dtype in (input.dtype, torch.float32)
    exact = input.float()
    reciprocal = torch.rsqrt(exact.square().mean(-1, keepdim=True) + epsilon)
    return (exact * reciprocal * gamma.float()).to(input.dtype), reciprocal


@_emulates
def npu_rotary_mul(input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half") -> Tensor:
    """Turn adjacent pairs (interleave), or the two halves of the head against each other."""
    batch, length, num_heads, head_size = input.shape
    assert batch * num_heads < 1000
    assert head_size < 896
    assert head_size % 2 == 0
    assert r1.shape == r2.shape == (1, length, 1, head_size)
    assert input.dtype in DTYPES
    r1, r2 = r1.to(input.dtype), r2.to(input.dtype)  # the adapter rounds the tables
    if rotary_mode == "interleave":
        turned = torch.stack((-input[..., 1::2], input[..., 0::2]), dim=-1).flatten(-2)
    else:
        first, second = input.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    return input * r1 + turned * r2


@_emulates
def npu_gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    """Apply GELU, exact or by tanh."""
    assert input.dtype in DTYPES
    return torch.nn.functional.gelu(input, approximate=approximate)

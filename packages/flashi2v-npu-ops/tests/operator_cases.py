"""One call of every operator in each of its situations, for whatever runs all of them: backends, compilers, devices."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashi2v_npu_ops import (
    apply_rope,
    attention,
    attention_part,
    attention_part_grad,
    conv3d,
    gated_residual,
    gelu_tanh,
    layer_norm_modulate,
    merge_parts,
    rms_norm,
    split_frequencies,
)

# What two ways of computing one thing may differ by, by the dtype of the activations.
TOLERANCE = {
    torch.float32: {"atol": 2e-5, "rtol": 1e-4},
    torch.bfloat16: {"atol": 2e-2, "rtol": 2e-2},
    torch.float16: {"atol": 3e-3, "rtol": 3e-3},
}


class OperatorCase(NamedTuple):
    """A call by backend name, and the tensors whose gradients count."""

    operator: str
    call: Callable[[str], Tensor]
    inputs: tuple[Tensor, ...]


def normal(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    """Return a leaf with the same numbers on every device."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(device, dtype).requires_grad_()


def rope_tables(num_tokens: int, head_size: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    angles = torch.arange(num_tokens).double()[:, None] * 0.7 ** torch.arange(head_size // 2).double()
    return angles.cos().float().to(device), angles.sin().float().to(device)


def attention_mask(device: str = "cpu") -> Tensor:
    """(2, 1, 7, 5), with one query that attends to nothing."""
    mask = torch.rand(2, 1, 7, 5, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[0, :, 2] = False
    return mask.to(device)


class InParts(torch.autograd.Function):
    """Attention over two parts of the keys, one after the other, as processes do that pass keys on."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float | None, backend: str) -> Tensor:
        exact = torch.promote_types(query.dtype, torch.float32)
        parts = [*zip(key.split((2, key.shape[1] - 2), 1), value.split((2, value.shape[1] - 2), 1))]
        out, lse = attention_part(query, *parts[0], scale=scale, backend=backend)
        out, lse = merge_parts(out.to(exact), lse, *attention_part(query, *parts[1], scale=scale, backend=backend))
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.scale, ctx.backend = scale, backend
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        parts = zip(key.split((2, key.shape[1] - 2), 1), value.split((2, value.shape[1] - 2), 1))
        found = [
            attention_part_grad(query, *part, grads[0], out, lse, scale=ctx.scale, backend=ctx.backend)
            for part in parts
        ]
        of_queries, of_keys, of_values = zip(*found)
        return sum(of_queries), torch.cat(of_keys, 1), torch.cat(of_values, 1), None, None


def operator_cases(dtype: torch.dtype, device: str = "cpu") -> dict[str, OperatorCase]:
    """Return the cases by name; `dtype` is that of the activations."""

    def leaf(*shape: int, seed: int = 0, dtype: torch.dtype = dtype) -> Tensor:
        return normal(*shape, dtype=dtype, device=device, seed=seed)

    q, k, v = leaf(2, 7, 3, 8), leaf(2, 5, 3, 8, seed=1), leaf(2, 5, 3, 8, seed=2)
    mask = attention_mask(device)
    x, update, weight = leaf(2, 7, 24), leaf(2, 7, 24, seed=1), leaf(24, seed=2)
    exact = torch.promote_types(dtype, torch.float32)
    exact_weight = leaf(24, seed=2, dtype=exact)
    cos, sin = (table.to(exact) for table in rope_tables(7, 8, device))
    shift, scale = leaf(2, 1, 24, seed=3, dtype=exact), leaf(2, 1, 24, seed=4, dtype=exact)
    one_x, one_shift, one_scale = leaf(1, 7, 24), leaf(1, 1, 24, seed=3, dtype=exact), leaf(1, 1, 24, seed=4)
    # Gradients of convolutions are sums over all places: what is convolved is divided, so that they are about 1.
    video, kernel, bias = leaf(2, 4, 5, 6, 7), leaf(6, 4, 3, 3, 2, seed=1), leaf(6, seed=2)
    patches, part = leaf(3, 4, 1, 2, 2, seed=3), leaf(6, 2, 2, 1, 3, seed=4)
    latent, odd_latent, ratio = leaf(2, 4, 6, 10), leaf(1, 4, 9, 7), torch.tensor([0.1, 0.6], device=device)

    def split(latent: Tensor, ratio: Tensor | float, magnitude: bool, backend: str) -> Tensor:
        high, low, cutoff = split_frequencies(latent, ratio, magnitude=magnitude, backend=backend)
        assert not cutoff.requires_grad
        return torch.cat((high, low))

    return {
        "self attention": OperatorCase("attention", lambda b: attention(q, q, q, backend=b), (q,)),
        "cross attention": OperatorCase("attention", lambda b: attention(q, k, v, scale=0.3, backend=b), (q, k, v)),
        "masked attention": OperatorCase("attention", lambda b: attention(q, k, v, mask=mask, backend=b), (q, k, v)),
        "2-d mask": OperatorCase("attention", lambda b: attention(q, k, v, mask=mask[1, 0], backend=b), (q, k, v)),
        "1-d mask": OperatorCase("attention", lambda b: attention(q, k, v, mask=mask[1, 0, 0], backend=b), (q, k, v)),
        "key mask per head": OperatorCase(
            "attention", lambda b: attention(q, k, v, mask=mask[1, :, :3, None], backend=b), (q, k, v)
        ),
        "attention in parts": OperatorCase("attention_part", lambda b: InParts.apply(q, k, v, None, b), (q, k, v)),
        "attention in parts, scaled": OperatorCase(
            "attention_part_grad", lambda b: InParts.apply(q, k, v, 0.3, b), (q, k, v)
        ),
        "rms_norm": OperatorCase("rms_norm", lambda b: rms_norm(x, weight, 1e-6, backend=b), (x, weight)),
        "rms_norm, exact weight": OperatorCase(
            "rms_norm", lambda b: rms_norm(x, exact_weight, 1e-6, backend=b), (x, exact_weight)
        ),
        "layer_norm_modulate": OperatorCase(
            "layer_norm_modulate",
            lambda b: layer_norm_modulate(x, shift, scale, 1e-6, backend=b),
            (x, shift, scale),
        ),
        "layer_norm_modulate, one sample": OperatorCase(
            "layer_norm_modulate",
            lambda b: layer_norm_modulate(one_x, one_shift, one_scale, 1e-6, backend=b),
            (one_x, one_shift, one_scale),
        ),
        "gated_residual": OperatorCase(
            "gated_residual", lambda b: gated_residual(x, update, shift, backend=b), (x, update, shift)
        ),
        "conv3d, padded": OperatorCase(
            "conv3d", lambda b: conv3d(video, kernel, bias, padding=(1, 1, 0), backend=b) / 16, (video, kernel, bias)
        ),
        "conv3d, patches": OperatorCase(
            "conv3d", lambda b: conv3d(video, patches, None, stride=(1, 2, 2), backend=b) / 16, (video, patches)
        ),
        "conv3d, strided, dilated, grouped": OperatorCase(
            "conv3d",
            lambda b: conv3d(video, part, bias, (2, 1, 2), (1, 0, 1), (2, 1, 1), groups=2, backend=b) / 16,
            (video, part, bias),
        ),
        "apply_rope": OperatorCase("apply_rope", lambda b: apply_rope(q, cos, sin, backend=b), (q,)),
        "gelu_tanh": OperatorCase("gelu_tanh", lambda b: gelu_tanh(x, backend=b), (x,)),
        "split, magnitude": OperatorCase("split_frequencies", lambda b: split(latent, ratio, True, b), (latent,)),
        "split, real": OperatorCase("split_frequencies", lambda b: split(odd_latent, 0.3, False, b), (odd_latent,)),
    }

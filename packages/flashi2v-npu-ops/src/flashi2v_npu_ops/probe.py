"""Does each operator compute on this machine what it computes on a CPU? One process each: some end it, or never end.

`flashi2v-npu-ops doctor --probe` runs this. B batch, N tokens, K heads, d head size, D width.
"""

import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashi2v_npu_ops import device, operators, registry

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Largest difference from the CPU's fp32, as a share of the largest number.
TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2}
SIZES = ("tiny", "real")
_ROWS = 64  # tokens that the CPU computes of an attention over many: each is a computation of its own


@dataclass(frozen=True)
class Probe:
    """What became of an operator: "right", "wrong", "slow" (longer than the limit) or "crashed"."""

    operator: str
    size: str  # "tiny", or "real": of the 1.3B model at 49x480x832, and of a tile of its VAE
    dtype: str
    backend: str
    verdict: str
    error: float | None = (
        None  # largest difference from the CPU, of result and gradient, as a share of the largest number
    )
    milliseconds: float | None = None  # forward and backward, the median of three
    words: str = ""  # the last line of what crashed


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _case(operator: str, size: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Return a function of the inputs and the backend's name, and the inputs; the first one's gradient counts."""
    batch, tokens, heads, head_size, mlp = (1, 20280, 12, 128, 8960) if size == "real" else (2, 7, 3, 16, 40)
    width = heads * head_size
    x, row = _normal(batch, tokens, width), (batch, 1, width)
    if operator.startswith("attention"):
        attend = {"attention": _attend, "attention_part": _attend_part, "attention_part_grad": _attend_part_back}
        return attend[operator], [_normal(batch, tokens, heads, head_size, seed=seed) for seed in range(3)]
    if operator == "rms_norm":
        return lambda x, w, backend: operators.rms_norm(x, w, 1e-6, backend=backend), [x, _normal(width, seed=1)]
    if operator == "layer_norm_modulate":
        return _modulate, [x, _normal(*row, seed=1), _normal(*row, seed=2)]
    if operator == "gated_residual":
        return operators.gated_residual, [x, _normal(*x.shape, seed=1), _normal(*row, seed=2)]
    if operator == "gelu_tanh":
        return operators.gelu_tanh, [_normal(batch, tokens, mlp)]
    if operator == "apply_rope":
        angles = torch.arange(tokens)[:, None] * 0.9 ** torch.arange(head_size // 2)
        return operators.apply_rope, [_normal(batch, tokens, heads, head_size), angles.cos(), angles.sin()]
    if operator == "conv3d":
        channels, frames, side = (96, 6, 256) if size == "real" else (4, 4, 6)
        kernel = _normal(channels, channels, 3, 3, 3, seed=1) / channels
        return _convolve, [_normal(1, channels, frames, side, side), kernel, _normal(channels, seed=2)]
    assert operator == "split_frequencies", operator
    return _split, [_normal(batch, 16, 60, 104) if size == "real" else _normal(batch, 4, 6, 10)]


def _attend(query: Tensor, key: Tensor, value: Tensor, backend: str) -> Tensor:
    return operators.attention(query, key, value, backend=backend)


class _Part(torch.autograd.Function):
    """Attention over all keys as one part, whose gradients are those of the part."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, forward: str, backward: str) -> Tensor:
        out, lse = operators.attention_part(query, key, value, backend=forward)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.backend = backward
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        return (
            *operators.attention_part_grad(query, key, value, grads[0], out, lse, backend=ctx.backend),
            *(None, None),
        )


def _attend_part(query: Tensor, key: Tensor, value: Tensor, backend: str) -> Tensor:
    out: Tensor = _Part.apply(query, key, value, backend, _with(backend))
    return out


def _attend_part_back(query: Tensor, key: Tensor, value: Tensor, backend: str) -> Tensor:
    out: Tensor = _Part.apply(query, key, value, _with(backend), backend)
    return out


def _with(backend: str) -> str:
    """Return the backend of what a probe calls beside its operator: that of the device, or all by the reference."""
    return backend if backend == "reference" else "auto"


def _modulate(x: Tensor, shift: Tensor, scale: Tensor, backend: str) -> Tensor:
    return operators.layer_norm_modulate(x, shift, scale, 1e-6, backend=backend)


def _convolve(x: Tensor, kernel: Tensor, bias: Tensor, backend: str) -> Tensor:
    return operators.conv3d(x, kernel, bias, padding=(0, 1, 1), backend=backend)


def _split(latent: Tensor, backend: str) -> Tensor:
    return operators.split_frequencies(latent, 0.1, magnitude=False, backend=backend)[0]


def measure(operator: str, size: str, dtype: str, backend: str, name: str) -> dict[str, Any]:
    """Run an operator forward and backward in this process; return its error and its milliseconds."""
    torch.backends.cudnn.allow_tf32 = False  # convolutions in fp32 would have 10 bits on a GPU
    call, inputs = _case(operator, size)
    where = device.resolve_device(name)
    given = [part.to(DTYPES[dtype]) for part in inputs]
    if operator == "apply_rope":  # whose tables are fp32 always
        given[1:] = inputs[1:]
    on_device = [part.to(where) for part in given]
    main = on_device[0].requires_grad_()
    times, cotangent = [], None
    for _ in range(4):
        start = time.perf_counter()
        out = call(*on_device, backend)
        if cotangent is None:  # not ones: that gradient of a norm, or of a high-pass filter, is zero
            cotangent = _normal(*out.shape, seed=9).to(where, out.dtype)
        (gradient,) = torch.autograd.grad(out, main, cotangent)
        device.synchronize(where)
        times.append(time.perf_counter() - start)
    exact = [part.float() for part in given]
    if operator.startswith("attention"):
        exact[0] = exact[0][:, :_ROWS]
    exact[0].requires_grad_()
    expected = call(*exact, "reference")
    assert cotangent is not None
    (expected_gradient,) = torch.autograd.grad(expected, exact[0], cotangent.cpu().float()[:, : expected.shape[1]])
    pairs = ((out, expected), (gradient, expected_gradient))
    error = max(_difference(ours.detach().cpu().float(), theirs.detach()) for ours, theirs in pairs)
    return {"error": error, "milliseconds": 1e3 * statistics.median(times[1:])}


def _difference(ours: Tensor, theirs: Tensor) -> float:
    if theirs.dim() > 1:
        ours = ours[:, : theirs.shape[1]]
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    return difference if difference == difference else float("inf")


def probe(operator: str, size: str, dtype: str, backend: str, name: str, seconds: float) -> Probe:
    """Run an operator in a process of its own, for so many seconds at most."""
    what = (operator, size, dtype, backend)
    try:
        finished = subprocess.run(
            [sys.executable, "-m", "flashi2v_npu_ops.probe", *what, name],
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return Probe(*what, "slow", words=f"not done within {seconds:g} s")
    if finished.returncode:
        lines = finished.stderr.strip().splitlines() or [""]
        ended = f"{signal.Signals(-finished.returncode).name} " if finished.returncode < 0 else ""
        return Probe(*what, "crashed", words=f"{ended}{_reason(lines)}"[:300])
    found = json.loads(finished.stdout.splitlines()[-1])
    return Probe(*what, "right" if found["error"] <= TOLERANCE[dtype] else "wrong", **found)


def _reason(lines: list[str]) -> str:
    """Return the line that names an error; torch_npu adds its own behind it."""
    return next((line for line in reversed(lines) if "Error: " in line and not line.startswith("[")), lines[-1])


def probe_all(name: str, seconds: float, names: Sequence[str] = (), sizes: Sequence[str] = SIZES) -> Iterator[Probe]:
    """Probe what "auto" chooses for operators (all, unless some are named), and where that fails what else there is."""
    kind = torch.device(name).type
    for operator in names or registry.operators():
        for dtype in DTYPES:
            try:
                chosen = registry.explain(operator, registry.Case(kind, DTYPES[dtype])).backend
            except registry.UnsupportedError:  # what FLASHI2V_OPS_BACKEND names: a finding of its own
                continue
            for backend in (chosen, *(other for other in _others(operator, kind) if other != chosen)):
                found = [probe(operator, size, dtype, backend, name, seconds) for size in sizes]
                yield from found
                if all(each.verdict == "right" for each in found):
                    break


def _others(operator: str, kind: str) -> list[str]:
    known = registry.all_backends()
    return [name for name in registry.backends(operator) if known[name].is_for(kind)]


def setting(found: list[Probe]) -> str | None:
    """Return the line that leads around what failed, None where nothing did.

    Raises:
        LookupError: an operator is right with no backend; it is named.
    """
    chosen = []
    for operator in dict.fromkeys(each.operator for each in found):
        mine = [each for each in found if each.operator == operator]
        names = list(dict.fromkeys(each.backend for each in mine))
        if len(names) == 1 and all(each.verdict == "right" for each in mine):
            continue
        bad = {each.backend for each in mine if each.verdict != "right"}
        good = [name for name in names if name not in bad]
        if not good:
            raise LookupError(operator)
        chosen.append(f"{operator}={good[-1]}")
    return f"export {registry.ENVIRONMENT}={','.join(chosen)}" if chosen else None


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))

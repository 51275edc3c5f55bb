"""Every backend of every operator against its reference, and the Fourier filter against the textbook, in one run.

Sizes are those of the 1.3B model: one latent frame of 480x832 on a CPU, all 13 frames in bf16 on an accelerator.
"""

import platform
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer

from flashi2v_npu_ops import (
    UnsupportedError,
    apply_rope,
    attention,
    backends,
    gated_residual,
    gelu_tanh,
    layer_norm_modulate,
    rms_norm,
    split_frequencies,
)
from flashi2v_npu_ops.device import name, resolve_device

HEADS, HEAD_SIZE, FFN = 12, 128, 8960
WIDTH = HEADS * HEAD_SIZE
Case = tuple[str, Callable[[str], object]]


def textbook_split(latent: Tensor, ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """The Fourier filter as one writes it down: a whole complex spectrum, a sort per call, two inverse transforms."""
    height, width = latent.shape[-2:]
    spectrum = torch.fft.fftshift(torch.fft.fft2(latent), dim=(-2, -1))
    y, x = (torch.arange(n, device=latent.device) - n // 2 for n in (height, width))
    radius = (y[:, None].square() + x.square()).float().sqrt().flatten()
    profile = (spectrum.real.square() + spectrum.imag.square() + 1e-12).sqrt().mean(1).flatten(1)
    order = radius.argsort(stable=True)
    cumulated = profile[:, order].cumsum(-1)
    last = (cumulated < ratio * profile.sum(-1, keepdim=True)).sum(-1).clamp(max=height * width - 1)
    cutoff = radius[order][last]
    keep = (radius >= cutoff[:, None]).view(-1, 1, height, width)
    high = torch.fft.ifft2(torch.fft.ifftshift(spectrum * keep, dim=(-2, -1)))
    low = torch.fft.ifft2(torch.fft.ifftshift(spectrum * ~keep, dim=(-2, -1)))
    return (high.real.square() + high.imag.square() + 1e-12).sqrt(), low.real, cutoff


def differentiable(device: torch.device, dtype: torch.dtype, tokens: int) -> dict[str, Case]:
    def leaf(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype, requires_grad=True)

    q, k, v = (leaf(1, tokens, HEADS, HEAD_SIZE) for _ in range(3))
    text = leaf(1, 512, HEADS, HEAD_SIZE)
    x, update, hidden, weight = leaf(1, tokens, WIDTH), leaf(1, tokens, WIDTH), leaf(1, tokens, FFN), leaf(WIDTH)
    gate = leaf(1, 1, WIDTH, dtype=torch.float32)
    cos, sin = (torch.rand(tokens, HEAD_SIZE // 2, device=device) for _ in range(2))
    return {
        "self attention": ("attention", lambda b: attention(q, k, v, backend=b)),
        "cross attention": ("attention", lambda b: attention(q, text, text, backend=b)),
        "rms_norm": ("rms_norm", lambda b: rms_norm(x, weight, 1e-6, backend=b)),
        "layer_norm_modulate": ("layer_norm_modulate", lambda b: layer_norm_modulate(x, gate, gate, 1e-6, backend=b)),
        "gated_residual": ("gated_residual", lambda b: gated_residual(x, update, gate, backend=b)),
        "apply_rope": ("apply_rope", lambda b: apply_rope(q, cos, sin, backend=b)),
        "gelu_tanh": ("gelu_tanh", lambda b: gelu_tanh(hidden, backend=b)),
    }


def bench_short_sequences() -> None:
    """Training attention in bf16 on a CPU: torch's own kernel in that type against what the operator makes of it."""
    for tokens in (80, 256):
        q, k, v = (torch.randn(16, tokens, 6, 32, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))

        def plain(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> None:
            out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
            out.sum().backward()

        def ours(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> None:
            attention(q, k, v).sum().backward()

        torch_, own = (seconds(call, torch.device("cpu")) for call in (plain, ours))
        print(f"bf16, N={tokens:<20} SDPA {torch_ * 1e3:9.3f} ms, ours {own * 1e3:9.3f} ms  {torch_ / own:6.2f}x SDPA")


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the median of several blocks of calls."""
    # Timer waits for CUDA devices itself.
    statement = "call()" if device.type != "npu" else "call(); torch.npu.synchronize()"
    timer = Timer(statement, globals={"call": call, "torch": torch}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=1.0).median


def compare(label: str, operator: str, call: Callable[[str], object], device: torch.device) -> None:
    try:
        reference = seconds(partial(call, "reference"), device)
    except torch.OutOfMemoryError:
        print(f"{label:<28} {'reference':<10} out of memory")
        reference = float("nan")
    for backend in backends(operator):
        try:
            call(backend)
        except (UnsupportedError, torch.OutOfMemoryError):
            continue
        own = reference if backend == "reference" else seconds(partial(call, backend), device)
        print(f"{label:<28} {backend:<10} {own * 1e3:9.3f} ms  {reference / own:6.2f}x reference")


def main() -> None:
    device = resolve_device()
    dtype, tokens = (torch.float32, 1560) if device.type == "cpu" else (torch.bfloat16, 20280)
    print(f"{name(device.type)}, torch {torch.__version__}, {platform.platform()}, N={tokens}, {dtype}")
    print("forward and backward")
    for label, (operator, call) in differentiable(device, dtype, tokens).items():
        compare(label, operator, lambda b, call=call: call(b).sum().backward(), device)

    if device.type == "cpu":
        bench_short_sequences()

    print("forward")
    for batch in (1, 8):
        latent = torch.randn(batch, 16, 60, 104, device=device)
        label = f"split ({batch}, 16, 60, 104)"
        textbook = seconds(partial(textbook_split, latent, 0.1), device)
        print(f"{label:<28} {'textbook':<10} {textbook * 1e3:9.3f} ms")
        for backend in backends("split_frequencies"):
            try:
                split_frequencies(latent, 0.1, backend=backend)
            except UnsupportedError:
                continue
            own = seconds(partial(split_frequencies, latent, 0.1, backend=backend), device)
            print(f"{label:<28} {backend:<10} {own * 1e3:9.3f} ms  {textbook / own:6.2f}x textbook")


if __name__ == "__main__":
    main()

"""Every backend of every operator against its reference: forward and backward, as ratios within this run."""

from collections.abc import Callable

import torch
from torch.utils.benchmark import Compare, Timer

from flashi2v_npu_ops import apply_rope, attention, backends, rms_norm
from flashi2v_npu_ops.device import resolve_device

TOKENS, HEADS, HEAD_DIM = 1560, 12, 128  # one latent frame of 480x832, the 1.3B model's heads


def cases(device: torch.device) -> dict[str, tuple[str, Callable[[str], torch.Tensor]]]:
    q, k, v = (torch.randn(1, TOKENS, HEADS, HEAD_DIM, device=device, requires_grad=True) for _ in range(3))
    text = torch.randn(1, 512, HEADS, HEAD_DIM, device=device, requires_grad=True)
    x = torch.randn(1, TOKENS, HEADS * HEAD_DIM, device=device, requires_grad=True)
    weight = torch.ones(HEADS * HEAD_DIM, device=device, requires_grad=True)
    cos, sin = (torch.rand(TOKENS, HEAD_DIM // 2, device=device) for _ in range(2))
    return {
        "self attention": ("attention", lambda backend: attention(q, k, v, backend=backend)),
        "cross attention": ("attention", lambda backend: attention(q, text, text, backend=backend)),
        "rms_norm": ("rms_norm", lambda backend: rms_norm(x, weight, 1e-6, backend=backend)),
        "apply_rope": ("apply_rope", lambda backend: apply_rope(q, cos, sin, backend=backend)),
    }


def main() -> None:
    device = resolve_device()
    measured, ratios = [], []
    for label, (operator, call) in cases(device).items():
        medians = {}
        for backend in reversed(backends(operator)):  # the reference first
            timer = Timer(
                "call(backend).sum().backward()",
                globals={"call": call, "backend": backend},
                num_threads=torch.get_num_threads(),
                label=f"forward and backward on {device}",
                sub_label=label,
                description=backend,
            )
            measured.append(timer.blocked_autorange(min_run_time=1.0))
            medians[backend] = measured[-1].median
        ratios += [f"{label}: {b} is {medians['reference'] / t:.2f}x reference" for b, t in medians.items()]
    Compare(measured).print()
    print("\n".join(ratios))


if __name__ == "__main__":
    main()

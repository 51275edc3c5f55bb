"""AdamW in the implementation that is right on the parameters' device."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import AdamW

from flashi2v_npu_ops.registry import dispatch, register


def fused_adamw(
    params: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    backend: str = "auto",
) -> AdamW:
    """Return an AdamW optimizer whose step is one kernel per parameter, where the device has such a kernel.

    Args:
        params: parameters, or groups of them, as `torch.optim` takes them; all on one type of device. The optimizer's
            state has their dtype.
        lr: learning rate.
        betas: decay of the moving averages of gradient and squared gradient.
        eps: added to the root of the second.
        weight_decay: decoupled from the gradient, a share of `lr`.
        backend: "auto" or one of `backends("fused_adamw")`.

    Raises:
        ValueError: there are no parameters, or they lie on several types of device.
        UnsupportedError: the named backend cannot serve this device.

    Source: Loshchilov and Hutter, arXiv 1711.05101, algorithm 2.
    """
    groups = [{**group, "params": _listed(group["params"])} if isinstance(group, dict) else group for group in params]
    members = [member for group in groups for member in (group["params"] if isinstance(group, dict) else [group])]
    tensors = [member[1] if isinstance(member, tuple) else member for member in members]  # named or not
    devices = sorted({tensor.device.type for tensor in tensors})
    if len(devices) != 1:
        raise ValueError(f"fused_adamw takes parameters on one type of device, got {', '.join(devices) or 'none'}")
    floating = all(tensor.is_floating_point() for tensor in tensors)
    return dispatch("fused_adamw", backend, (devices[0], floating), groups, lr, betas, eps, weight_decay)


def _listed(params: Any) -> list[Any]:
    """Hold on to parameters that may come from a generator."""
    return [params] if isinstance(params, Tensor) else list(params)


@register("fused_adamw", "reference")
def _reference(params: list[Any], lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> AdamW:
    return AdamW(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, foreach=False, fused=False)


def fused_obstacle(device: str, floating: bool) -> str | None:
    """Return why `torch.optim.AdamW(fused=True)` cannot serve parameters, or None."""
    if device not in ("cpu", "cuda", "npu", "mps", "xpu"):
        return f"PyTorch has no fused AdamW for {device} devices"
    return None if floating else "PyTorch's fused AdamW takes real floating-point parameters, some are not"


@register("fused_adamw", "torch", obstacle=fused_obstacle)
def fused(params: list[Any], lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> AdamW:
    """Return PyTorch's AdamW with fused steps."""
    return AdamW(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)

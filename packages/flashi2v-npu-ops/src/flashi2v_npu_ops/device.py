"""Which accelerator there is, and what it needs: asked here and nowhere else."""

import sys

import torch

from flashi2v_npu_ops import ascend
from flashi2v_npu_ops.registry import UnsupportedError

_COLLECTIVES = {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}


def missing(device_type: str) -> str | None:
    """Return why this process cannot use devices of a type ("npu", "cuda", "cpu"), with what mends it, or None."""
    if device_type == "cpu":
        return None
    if device_type == "cuda":
        return None if torch.cuda.is_available() else "PyTorch sees no CUDA device: check the driver, or use 'cpu'"
    if device_type == "npu":
        return ascend.missing()
    return f"unknown device type {device_type!r}: choose one of auto, {', '.join(_COLLECTIVES)}"


def resolve_device(name: str = "auto", *, index: int | None = None) -> torch.device:
    """Return the device called `name`: "auto" (an NPU, else a GPU, else the CPU), "npu", "cuda", "cpu", "cuda:1", ...

    Args:
        name: the device.
        index: which one of several, for example the local rank; on the CPU it has no meaning.

    Raises:
        UnsupportedError: this machine lacks it; the message says what to install or choose.
    """
    if name == "auto":
        name = next(kind for kind in _COLLECTIVES if missing(kind) is None)
    kind, _, number = name.partition(":")
    if number and not number.isdecimal():
        raise UnsupportedError(f"device {name!r}: what follows the colon must be a number")
    reason = missing(kind)
    if reason is not None:
        raise UnsupportedError(f"device {name!r}: {reason}")
    if kind == "cpu":
        return torch.device("cpu")
    position = int(number) if number else index or 0
    count = getattr(torch, kind).device_count()
    if position >= count:
        raise UnsupportedError(f"device {kind}:{position}: this machine has {count} ({kind}:0 to {kind}:{count - 1})")
    return torch.device(kind, position)


def collective_backend(device: torch.device) -> str:
    """Return the torch.distributed backend of a device: hccl, nccl or gloo."""
    return _COLLECTIVES[device.type]


def name(device_type: str) -> str:
    """Return what the first device of an available type calls itself, and how many there are."""
    if device_type == "cpu":
        return f"{torch.get_num_threads()} threads"
    module = getattr(torch, device_type)
    return f"{module.device_count()} x {module.get_device_name(0)}"


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all queued work."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Return the most bytes held so far: allocated on an accelerator, resident in this process on the CPU."""
    if device.type != "cpu":
        return int(getattr(torch, device.type).max_memory_allocated(device))
    import resource  # where there is one: not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB

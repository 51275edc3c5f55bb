"""Which accelerator there is, and what it needs: asked here and nowhere else.

This is the only file that imports torch_npu, an optional extra. It needs CANN, and imports of it fail without, so it is
imported only when an NPU is asked for.
"""

import contextlib
import importlib.util
import logging
import os
import sys
from functools import cache
from pathlib import Path

import torch

from flashi2v_npu_ops.installation import find_installation, fix_of_loading
from flashi2v_npu_ops.registry import UnsupportedError

logger = logging.getLogger(__name__)

# An NPU's processes also exchange what is on the CPU: checkpoints that are written meanwhile, for one.
_COLLECTIVES = {"npu": "cpu:gloo,npu:hccl", "cuda": "nccl", "cpu": "gloo"}
_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
_STATUS, _RESET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def missing(device_type: str) -> str | None:
    """Return why this process cannot use devices of a type ("npu", "cuda", "cpu"), with what fixes it, or None."""
    if device_type == "cpu":
        return None
    if device_type == "cuda":
        return None if torch.cuda.is_available() else "PyTorch sees no CUDA device: check the driver, or use 'cpu'"
    if device_type == "npu":
        return _missing_npu()
    return f"unknown device type {device_type!r}: choose one of auto, {', '.join(_COLLECTIVES)}"


@cache
def _missing_npu() -> str | None:
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed: pip install 'flashi2v-npu-ops[npu]' on the Ascend machine"
    autoload = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD")
    try:
        import torch_npu
    except Exception as error:  # anything: it patches torch, and one that does not fit fails in ways of its own
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        return f"torch_npu does not load ({reason}): {fix_of_loading(find_installation())}"
    finally:  # torch_npu switches this off, and leaves it so where its import fails
        if autoload is None:
            os.environ.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)
        else:
            os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = autoload
    if not torch_npu.npu.is_available():
        return f"torch_npu sees no NPU: {fix_of_loading(find_installation())}"
    return None


@cache
def _warn_once(words: str) -> None:
    logger.warning(words)


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
        if name != "npu" and importlib.util.find_spec("torch_npu") is not None:
            _warn_once(f"no NPU is used, but {name}: {missing('npu')}")
    kind, _, number = name.partition(":")
    if number and not (number.isdecimal() and len(number) < 5):
        raise UnsupportedError(f"device {name!r}: what follows the colon must be a number, as in {kind}:0")
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


def claim_device(name: str = "auto") -> torch.device:
    """Return the device of this process among those that torchrun started on this machine, and make it its own.

    An accelerator becomes the current one; on the CPU the processes share out the cores.

    Args:
        name: as of `resolve_device`.

    Raises:
        UnsupportedError: this machine lacks it, or it is one device for several processes.
    """
    local, neighbours = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if neighbours > 1 and ":" in name:
        raise UnsupportedError(f"device {name!r} is one device for {neighbours} processes: leave its number out")
    device = resolve_device(name, index=local)
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
    elif neighbours > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // neighbours))
    return device


def collective_backend(device: torch.device) -> str:
    """Return the torch.distributed backend of a device: cpu:gloo,npu:hccl for NPUs, else nccl or gloo."""
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
    """Return the most bytes held since the start, or since `reset_peak_memory`.

    Allocated by PyTorch on an accelerator; resident in this process, libraries included, on the CPU.
    """
    if device.type != "cpu":
        return int(getattr(torch, device.type).max_memory_allocated(device))
    if _STATUS.exists():  # Linux: the number of `resource` below begins with that of the process that started this one
        return _kibibytes(_STATUS, "VmHWM")
    import resource  # where there is one: not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` start anew; on the CPU only Linux may, elsewhere the peak stays that of the whole process."""
    if device.type != "cpu":
        getattr(torch, device.type).reset_peak_memory_stats(device)
    elif _RESET_PEAK.exists():
        with contextlib.suppress(PermissionError):  # some containers guard the file
            _RESET_PEAK.write_text("5")  # proc(5): resets the peak resident size


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that can still be allocated, or None where the system does not tell.

    On an accelerator, what the driver has and what PyTorch's allocator holds unused; on the CPU what Linux can give
    without swapping, within the limit of a container.
    """
    if device.type != "cpu":
        module = getattr(torch, device.type)
        free, _ = module.mem_get_info(device)
        return int(free + module.memory_reserved(device) - module.memory_allocated(device))
    if not _MEMINFO.exists():
        return None
    return min([_kibibytes(_MEMINFO, "MemAvailable"), *_container_room()])


def _kibibytes(file: Path, name: str) -> int:
    """Return what a line `name: 123 kB` says, in bytes."""
    numbers = dict(line.split(":", 1) for line in file.read_text().splitlines())
    return int(numbers[name].split()[0]) * 1024


def _container_room() -> list[int]:
    """Return what a container's limit leaves, if there is one (control groups, version 2)."""
    limit, used, statistics = (_CGROUP / f"memory.{name}" for name in ("max", "current", "stat"))
    if not limit.exists() or limit.read_text().strip() == "max":
        return []
    counted = dict(line.split() for line in statistics.read_text().splitlines())
    # Pages of files that were not read again lately are given up first.
    return [max(0, int(limit.read_text()) - int(used.read_text()) + int(counted["inactive_file"]))]

"""What devices of a kind do in a second, and what they send each other: from data sheets, or measured on a CPU."""

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# Dense bf16 operations per second with fp32 sums, by a word of the name that the device calls itself; the first that
# fits counts. NVIDIA: data sheets of the products, half of what they give for sparse matrices. Ascend: cores x 8192
# operations a cycle x clock, the matrix units alone; what the maker advertises adds the vector units.
_PEAKS = {
    "H200|GH200": 989e12,
    "H100 PCIe|H800 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100|H800": 989e12,
    "H20": 148e12,
    "A100|A800": 312e12,
    "L40S": 362e12,
    "RTX 4090 D|RTX 4090 Laptop GPU": None,
    "RTX 4090": 165e12,
    "A10": 125e12,
    "Ascend910B1": 374e12,
    "Ascend910B2C?": 354e12,
    "Ascend910B3": 295e12,
    "Ascend910B4": 246e12,
}
# Bytes per second that a device sends to the others of its machine, in one direction: NVLink or HCCS, by data sheets.
_LINKS = {
    "H100 PCIe|H800 PCIe|H100 NVL": 50e9,
    "H800|A800": 200e9,
    "H100|H200|GH200|H20": 450e9,
    "A100": 300e9,
    "Ascend910B[1-4]C?": 196e9,
}
# Bytes per second of its own memory, by data sheets.
_MEMORIES = {
    "H200|GH200": 4.8e12,
    "H100 PCIe|H800 PCIe": 2.0e12,
    "H100 NVL": 3.9e12,
    "H100|H800": 3.35e12,
    "H20": 4.0e12,
    "A100|A800": 2.0e12,
    "L40S": 864e9,
    "RTX 4090": 1008e9,
    "A10": 600e9,
    "Ascend910B[1-4]C?": 1.6e12,
}
_PCIE = 25e9  # of all others: PCIe 4.0, of 32 GB/s what transfers reach
# Assumed, as neither is in a data sheet: what of the peak a network reaches, and how long an exchange is under way.
_REACHED, _LATENCY = 0.5, 20e-6
_CPU_LATENCY, _CPU_BANDWIDTH = 1e-4, 2e9  # assumed of gloo on the loopback device


def peak_flops(device_name: str) -> float | None:
    """Return the bf16 operations per second that a device can do, or None where that is not known."""
    return _look_up(_PEAKS, device_name)


def _look_up(table: dict[str, float | None] | dict[str, float], device_name: str) -> float | None:
    # Whole words: an RTX A1000 is no A100.
    return next(
        (value for words, value in table.items() if re.search(rf"\b({words})(?![A-Za-z0-9])", device_name)), None
    )


@dataclass(frozen=True)
class Machine:
    """A machine with devices of one kind.

    Attributes:
        name: of the devices.
        flops: operations per second that one is taken to reach.
        memory: bytes per second that one reads and writes in its own memory.
        bandwidth: bytes per second that one sends.
        latency: seconds that an exchange takes beside its bytes.
        cores: that all devices share, as processes on a CPU do; None: each computes and sends by itself.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    latency: float
    cores: int | None = None

    def slowed(self, num_devices: int) -> float:
        """Return how many times longer everything takes where so many devices work at once."""
        return 1.0 if self.cores is None else max(1.0, num_devices / self.cores)


def machine_of(device_name: str) -> Machine | None:
    """Return what is known of accelerators that call themselves so, None where their rate is not."""
    peak, memory = peak_flops(device_name), _look_up(_MEMORIES, device_name)
    if peak is None or memory is None:
        return None
    return Machine(device_name, _REACHED * peak, memory, _look_up(_LINKS, device_name) or _PCIE, _LATENCY)


def measure_cpu(seconds: float = 0.2) -> Machine:
    """Measure what one thread of this CPU does, in fp32.

    Args:
        seconds: to spend on it.
    """
    a, b, large = torch.randn(512, 512), torch.randn(512, 512), torch.zeros(2**23)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        product = _shortest(lambda: torch.mm(a, b), seconds / 2)
        copy = _shortest(lambda: large.add_(1), seconds / 2)
    finally:
        torch.set_num_threads(threads)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_bytes = 2 * large.nbytes  # read and written
    return Machine("CPU", 2 * 512**3 / product, num_bytes / copy, _CPU_BANDWIDTH, _CPU_LATENCY, cores)


def _shortest(run: Callable[[], object], seconds: float) -> float:
    best, until = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < until:
        before = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - before)
    return best

"""The batch that a device can hold, and what must be done twice or kept elsewhere for it."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from flashi2v_data.errors import InputError
from flashi2v_train.config import RunConfig
from flashi2v_train.cost import predict
from flashi2v_train.start.options import InitOptions

_GIB = 2**30
# Of a device's memory; the rest is for kernels, fragments and the VAE that shows validation's videos.
_USABLE = 0.85


@dataclass(frozen=True)
class Saving:
    """A way to need less memory.

    Attributes:
        name: in words.
        options: of `flashi2v-train`.
    """

    name: str
    options: dict[str, Any]


_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
# In the order in which they are tried: each costs more time, or more, than the one before.
SAVINGS = (
    Saving("as it is", {}),
    Saving("layers computed twice", _RECOMPUTE),
    Saving("... and no moving average", {**_RECOMPUTE, "use_ema": False}),
    Saving("... and weights on the host", {**_RECOMPUTE, "use_ema": False, "fsdp_cpu_offload": True}),
)
# Of adapters the moving average is small.
LORA_SAVINGS = (
    *SAVINGS[:2],
    Saving("... and the model in 8 bits", {**_RECOMPUTE, "lora_quantize": "int8"}),
    Saving("... and that on the host", {**_RECOMPUTE, "lora_quantize": "int8", "fsdp_cpu_offload": True}),
)
CARDS = (24, 48, 80)  # GiB


class Devices(NamedTuple):
    """What is trained on."""

    kind: str
    gib: float  # of each
    number: int


@dataclass(frozen=True)
class Fit:
    """What a device holds.

    Attributes:
        saving: that it takes.
        micro_batch: samples at a time.
        gib: predicted for them.
        rows: of the table: a saving, what one sample takes, what each further one takes, how many fit.
    """

    saving: Saving
    micro_batch: int
    gib: float
    rows: list[tuple[str, float, float, int]]

    def table(self, gib: float) -> str:
        """Return what was found, for whoever wants to know why.

        Args:
            gib: memory of the device.
        """
        head = f"{'GiB on a device':<30}{'one sample':>12}{'each more':>12}{'fit':>6}"
        lines = [f"{head}   of {gib:.0f} GiB, {_USABLE:.0%} used"]
        lines += [f"{name:<30}{first:>12.2f}{more:>12.2f}{number:>6}" for name, first, more, number in self.rows]
        return "\n".join(lines)


def fit(config: RunConfig, devices: Devices, batch: int) -> Fit:
    """Choose how to train in a device's memory.

    Args:
        config: of the run.
        devices: over which weights and optimizer are spread.
        batch: samples of a step over all of them.

    Raises:
        InputError: not one sample fits.
    """
    most = max(1, batch // devices.number)
    rows: list[tuple[str, float, float, int]] = []
    least = 0.0
    savings = LORA_SAVINGS if config.options.trains_adapters else SAVINGS
    for saving in savings[:3] if devices.kind == "cpu" else savings:  # from the host nothing can be moved to the host
        least, more = measure(config, devices.number, saving)
        number = num_samples(least, more, devices.gib)
        rows.append((saving.name, least, more, number))
        if number:
            micro = max(divisor for divisor in range(1, min(most, number) + 1) if most % divisor == 0)
            return Fit(saving, micro, least + more * (micro - 1), rows)
    raise InputError(
        f"one sample takes {least:.1f} GiB even with all that saves memory, and of {devices.gib:.1f} GiB {_USABLE:.0%} "
        "can be used: set a smaller --size or fewer --frames, or spread it over more devices (--nproc-per-node)"
    )


def measure(config: RunConfig, processes: int, saving: Saving) -> tuple[float, float]:
    """Return the GiB that a device takes for one sample at a time, and for each further one."""
    changes = {**saving.options, "micro_batch_size": 1, "global_batch_size": None}
    tried = replace(config, options=config.options.model_copy(update=changes))
    memory = predict(tried, tried.parallel_dims(processes))[0].memory
    return memory.total / _GIB, (memory.activations + memory.recomputed) / _GIB


def num_samples(least: float, more: float, gib: float) -> int:
    """Return how many samples at a time a device's memory holds; arguments of `measure`'s, and its GiB."""
    return int((gib * _USABLE - least) / more) + 1 if least <= gib * _USABLE else 0


def describe_cards(config: RunConfig) -> str:
    """Return what adapters take on one card, by what saves memory, and how many samples at a time cards hold."""
    cards = "".join(f"{card:>7} GiB" for card in CARDS)
    lines = [
        f"{'GiB on one card':<30}{'one sample':>12}{'each more':>12}{cards}   samples at a time, {_USABLE:.0%} used"
    ]
    for saving in LORA_SAVINGS[:3]:
        least, more = measure(config, 1, saving)
        held = "".join(f"{num_samples(least, more, card):>11}" for card in CARDS)
        lines.append(f"{saving.name:<30}{least:>12.2f}{more:>12.2f}{held}")
    return "\n".join(lines)


def devices_of(options: InitOptions) -> Devices:
    """Return what to train on; what is given is not asked of the machine.

    Raises:
        InputError: there is no such device, or it does not tell its memory.
    """
    gib, number = options.memory, options.nproc_per_node
    if gib is not None and options.device != "auto":
        return Devices(options.device, gib, number or 1)
    import torch

    from flashi2v_npu_ops.device import free_memory, resolve_device

    found = resolve_device(options.device)
    if gib is None:
        free = free_memory(found)
        if free is None:
            raise InputError("this system does not tell how much memory is free: say it by --memory")
        gib = free / _GIB
    return Devices(found.type, gib, number or (1 if found.type == "cpu" else torch.accelerator.device_count()))

"""Which layout of so many devices samples one video fastest: counted operations, bytes over the links, memory.

A layout gives each branch of the guidance its own devices or not, and shares the tokens of a branch by Ulysses and a
ring. Operations are those of the network's own functions on the meta device, divided as the layout divides them; bytes
and messages are those of `flashi2v_model.parallel.traffic`. Computing is operations at the device's rate, and what all
else moves at that of its memory.

N tokens, K heads, d head size, n tokens of a device, P devices of a branch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch

from flashi2v_infer.plan.plan import Plan, gib, tera
from flashi2v_infer.settings import SamplingSettings
from flashi2v_model import FlashI2VTransformer3DModel
from flashi2v_model.caching import conditions_kept
from flashi2v_model.cost import Operations, count_operations
from flashi2v_model.machines import Machine
from flashi2v_model.parallel import ContextDegrees, Traffic, attention_rounds, attention_traffic
from flashi2v_model.parallel.degrees import share

_PASSES = 6  # over memory, for `merge_parts` by plain operators


@dataclass(frozen=True)
class Layout:
    """How devices share one video.

    Attributes:
        branches: 2 where each branch of the guidance has its own.
        context: degrees of those of a branch.
    """

    branches: int
    context: ContextDegrees

    @property
    def size(self) -> int:
        """All devices."""
        return self.branches * self.context.size

    @property
    def options(self) -> list[str]:
        """What the command line calls it."""
        words = ["--context-parallel-size", str(self.context.size), "--ulysses-degree", str(self.context.ulysses)]
        return [*words, "--guidance-parallel-size", str(self.branches)]

    def __str__(self) -> str:
        return f"guidance 2 x {self.context}" if self.branches > 1 else str(self.context)


@dataclass(frozen=True)
class Ranked:
    """A layout, and what a step takes of its busiest device.

    Attributes:
        layout: of the devices.
        flops: operations.
        traffic: what it sends.
        memory: bytes of weights and tensors.
        computing: seconds, predicted.
        sending: seconds, predicted.
        largest_share: of the attention's heads and tokens, times the number of devices: 1 where all have the same.
    """

    layout: Layout
    flops: float
    traffic: Traffic
    memory: int
    computing: float
    sending: float
    largest_share: float

    @property
    def seconds(self) -> float:
        """A step, predicted."""
        return self.computing + self.sending


def layouts_of(num_devices: int, num_heads: int, *, is_guided: bool) -> list[Layout]:
    """Return all layouts of so many devices: two branches, each degree of Ulysses up to the heads, a ring."""
    found = []
    for branches in (1, 2) if is_guided and num_devices % 2 == 0 else (1,):
        size = num_devices // branches
        degrees = [number for number in range(1, min(size, num_heads) + 1) if size % number == 0]
        found += [Layout(branches, ContextDegrees(ulysses, size // ulysses)) for ulysses in degrees]
    return found


def rank_layouts(
    transformer: FlashI2VTransformer3DModel,
    settings: SamplingSettings,
    machine: Machine,
    num_devices: int,
    plan: Plan,
    *,
    cfg_batch: bool = False,
) -> list[Ranked]:
    """Predict a step of each layout; the fastest first.

    Args:
        transformer: on any device, meta too.
        settings: of the video.
        machine: what its devices do and send.
        num_devices: of them.
        plan: of one device alone, whose memory is shared out.
        cfg_batch: branches that share devices come in one call.
    """
    config = transformer.config
    latent = (config.in_channels, *settings.latent_grid)
    inputs = _inputs(transformer, latent, settings)
    with conditions_kept(transformer):
        count_operations(transformer, inputs)  # the first step keeps for the others what all have in common
        operations = count_operations(transformer, inputs)
    num_tokens = prod(transformer.token_grid((1, *latent)))
    is_guided = settings.uses_negative_prompt
    found = [
        _ranked(layout, transformer, operations, num_tokens, latent, machine, plan, is_guided, cfg_batch)
        for layout in layouts_of(num_devices, config.num_attention_heads, is_guided=is_guided)
        if layout.context.size <= num_tokens
    ]
    return sorted(found, key=lambda ranked: ranked.seconds)


def _inputs(
    transformer: FlashI2VTransformer3DModel, latent: tuple[int, ...], settings: SamplingSettings
) -> dict[str, torch.Tensor]:
    config, device = transformer.config, transformer.proj_out.weight.device
    num_text = settings.max_sequence_length or config.text_len
    conditioning = {
        name: torch.zeros(1, *torch.tensor(value).shape, device=device) for name, value in settings.conditioning.items()
    }
    return conditioning | {
        "hidden_states": torch.zeros(1, *latent, device=device),
        "timestep": torch.zeros(1, device=device),
        "encoder_hidden_states": torch.zeros(1, num_text, config.text_dim, device=device),
        "condition": torch.zeros(1, latent[0], 1, *latent[2:], device=device),
        "low_freq_energy_ratio": torch.zeros(1, device=device),
    }


def _ranked(
    layout: Layout,
    transformer: FlashI2VTransformer3DModel,
    operations: Operations,
    num_tokens: int,
    latent: tuple[int, ...],
    machine: Machine,
    plan: Plan,
    is_guided: bool,
    cfg_batch: bool,
) -> Ranked:
    config, degrees = transformer.config, layout.context
    samples = (2 if is_guided else 1) // layout.branches  # of a device in each step
    together = cfg_batch or layout.branches > 1
    calls, batch = (1, samples) if together else (samples, 1)
    tokens, heads = share(num_tokens, degrees.size), share(config.num_attention_heads, degrees.ulysses)
    own = max(tokens) / num_tokens
    group = sum(tokens[: degrees.ulysses]) / num_tokens * max(heads) / config.num_attention_heads
    self_attention = 4 * num_tokens**2 * config.num_attention_heads * config.attention_head_dim
    rest = operations.matrices + operations.attention - self_attention
    flops = samples * (
        operations.embedding + own * operations.head + operations.num_layers * (own * rest + group * self_attention)
    )
    size = next(transformer.blocks.parameters()).element_size()
    attention = attention_traffic(
        degrees, num_tokens, config.num_attention_heads, config.attention_head_dim, batch=batch, itemsize=size
    )
    busiest = max(attention, key=lambda sent: sent.num_bytes)
    traffic = (busiest * operations.num_layers + _gathered(layout, tokens, latent, batch)) * calls
    slowed = machine.slowed(layout.size)
    # Parts of a ring are merged in fp32: the merged and the new one are read, some passes between, and written.
    merged = 4 * batch * sum(tokens[: degrees.ulysses]) * max(heads) * config.attention_head_dim
    first, block, behind = operations.moved
    moved = samples * (first + own * (operations.num_layers * block + behind))
    moved += calls * operations.num_layers * (degrees.ring - 1) * _PASSES * merged
    rounds = calls * (operations.num_layers * attention_rounds(degrees) + (degrees.size > 1) + (layout.branches > 1))
    (denoising,) = (stage for stage in plan.stages if stage.name == "denoising")
    return Ranked(
        layout,
        flops,
        traffic,
        int(denoising.weights + own * (denoising.peak - denoising.weights)),
        computing=slowed * (flops / machine.flops + moved / machine.memory),
        sending=slowed * (traffic.num_bytes / machine.bandwidth + rounds * machine.latency),
        largest_share=group * degrees.size,
    )


def _gathered(layout: Layout, tokens: Sequence[int], latent: tuple[int, ...], batch: int) -> Traffic:
    """Return what is sent once in each call: the velocity, in fp32, of the tokens, then of the branches."""
    velocity, found = 4 * batch * prod(latent), Traffic()
    if layout.context.size > 1:
        others = layout.context.size - 1
        found += Traffic(others, others * velocity * max(tokens) // sum(tokens))
    if layout.branches > 1:
        found += Traffic(1, velocity)
    return found


def table(ranked: Sequence[Ranked], machine: Machine) -> str:
    """Return the layouts as a table, and why the first is first."""
    best = ranked[0]
    lines = [
        f"| {best.layout.size} x {machine.name} | a step | computes | sends | operations | sent | messages | memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one.layout} | {_time(one.seconds)} | {_time(one.computing)} | {_time(one.sending)} | {tera(one.flops)} | "
        f"{gib(one.traffic.num_bytes)} | {one.traffic.messages} | {gib(one.memory)} |"
        for one in ranked
    ]
    return "\n".join([*lines, "", f"best: {best.layout}, {', '.join(reasons(ranked))}"])


def reasons(ranked: Sequence[Ranked]) -> Iterator[str]:
    """Say why the first layout is before the others."""
    best, others = ranked[0], ranked[1:]
    if not others:
        yield "the only one"
        return
    if best.largest_share > 1.01:
        yield f"though its busiest device attends {best.largest_share:.2f} times its share"
    elif any(one.largest_share > 1.01 for one in others):
        yield "with equally many heads for all"
    least = min(others, key=lambda one: one.traffic.num_bytes)
    if best.traffic.num_bytes < least.traffic.num_bytes:
        yield f"which sends least ({gib(best.traffic.num_bytes)} a step)"
    else:
        yield f"which computes least for all that it sends ({_time(best.computing)}, {least.layout} sends less)"
    yield f"{ranked[1].seconds / best.seconds:.2f} times as fast as {ranked[1].layout}"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"

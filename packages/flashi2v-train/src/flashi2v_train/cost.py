"""What a run will cost: parameters, operations and memory, worked out before anything starts.

B batch, N tokens of a sample, D width, L text tokens.  A multiplication with its addition counts as two operations.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import prod
from typing import TYPE_CHECKING

from flashi2v_data.errors import InputError
from flashi2v_train.config import RunConfig, TrainPredictorConfig
from flashi2v_train.parallel_dims import ParallelDims, even_split

if TYPE_CHECKING:
    from flashi2v_train.parallelise import Stage

GIB = 2**30
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


def peak_flops(device_name: str) -> float | None:
    """Return the bf16 operations per second that a device can do, or None where that is not known."""
    # Whole words: an RTX A1000 is no A100.
    return next(
        (peak for words, peak in _PEAKS.items() if re.search(rf"\b({words})(?![A-Za-z0-9])", device_name)), None
    )


@dataclass(frozen=True)
class Operations:
    """Operations of the forward pass of one sample.

    Attributes:
        embeddings: of video, features, time and text.
        shift: the latent shift.
        attention: of one block, the attention itself, to video and text.
        matrices: of one block, all linear layers.
        head: the projection to the velocity.
        num_layers: number of blocks.
    """

    embeddings: float
    shift: float
    attention: float
    matrices: float
    head: float
    num_layers: int

    @property
    def layer(self) -> float:
        """One block."""
        return self.attention + self.matrices

    @property
    def first(self) -> float:
        """What the first pipeline stage does beside its layers."""
        return self.embeddings + self.shift

    @property
    def forward(self) -> float:
        """The whole forward pass."""
        return self.first + self.num_layers * self.layer + self.head

    @property
    def training(self) -> float:
        """Forward and backward pass, which takes twice as long; what is computed again does not count."""
        return 3 * self.forward


def count_operations(predictor: TrainPredictorConfig, latent_shape: tuple[int, int, int, int]) -> Operations:
    """Count the operations of one sample.

    Args:
        predictor: the transformer.
        latent_shape: (C, F, H, W).
    """
    channels, frames, height, width = latent_shape
    patch, dim, text = prod(predictor.patch_size), predictor.hidden_size, predictor.text_len
    tokens = frames * height * width // patch
    kernel, places = (27, frames * height * width) if predictor.conv3x3x3_proj else (9, height * width)
    shift = 2 * 2 * kernel * places * channels * 4 * channels
    video = 2 * 2 * tokens * channels * patch * dim + 2 * tokens * dim * dim
    time = 2 * (predictor.freq_dim * dim + 7 * dim * dim)
    captions = 2 * text * (predictor.text_dim * dim + dim * dim)
    projections = 2 * dim * dim * (4 * tokens + 2 * tokens + 2 * text)
    attention = 2 * 2 * tokens * (tokens + text) * dim
    mlp = 2 * 2 * tokens * dim * predictor.ffn_dim
    return Operations(
        embeddings=video + time + captions,
        shift=shift,
        attention=attention,
        matrices=projections + mlp,
        head=2 * tokens * dim * channels * patch,
        num_layers=predictor.num_layers,
    )


def count_recomputed(config: RunConfig, dims: ParallelDims) -> float:
    """Return the operations of one sample that the backward pass does again to save memory."""
    options = config.options
    operations = count_operations(config.model.predictor, config.latent_shape)
    if options.recompute_granularity == "selective":
        return operations.num_layers * operations.attention
    if options.recompute_method == "uniform":
        return operations.num_layers * operations.layer
    again = 0.0
    for number in dims.layers:
        whole = min(number, options.recompute_num_layers or 0)
        partly = min(number - whole, options.recompute_num_layers_skip_core_attention)
        again += whole * operations.layer + partly * operations.matrices
    return again


def num_tokens(config: RunConfig) -> int:
    """Return N, the tokens of one sample."""
    _, frames, height, width = config.latent_shape
    return frames * height * width // prod(config.model.predictor.patch_size)


def bubble(num_processes: int, num_micro_batches: int, num_virtual: int = 1) -> float:
    """Return the share of a step that a pipeline's process waits, if all stages take equally long.

    Source: Narayanan et al., arXiv 2104.04473, section 2.2: (p - 1) / (v m) of the work.
    """
    idle = (num_processes - 1) / (num_virtual * num_micro_batches)
    return idle / (1 + idle)


def best_split(
    num_layers: int, num_processes: int, num_virtual: int = 1, *, layer: float, first: float, last: float
) -> tuple[int, ...]:
    """Return the layers of every stage such that the slowest process is as fast as can be.

    Args:
        num_layers: of the model.
        num_processes: of the pipeline.
        num_virtual: stages per process.
        layer: cost of a layer, in any unit.
        first: what the first stage costs beside its layers.
        last: the same of the last stage.

    Raises:
        InputError: there are more stages than layers.
    """
    even_split(num_layers, num_processes * num_virtual)  # refuses what cannot be split
    num_stages = num_processes * num_virtual
    split = [1] * num_stages
    extra = [first, *[0.0] * (num_stages - 2), last]

    def process(stage: int) -> float:
        own = range(stage % num_processes, num_stages, num_processes)
        return sum(extra[i] + split[i] * layer for i in own)

    # Layers are alike, so giving each to who is least busy then leaves the least maximum.
    for _ in range(num_layers - num_stages):
        stage = min(range(num_stages), key=lambda i: (process(i), extra[i] + split[i] * layer))
        split[stage] += 1
    return tuple(split)


def suggest_split(config: RunConfig, dims: ParallelDims) -> str:
    """Return what to write into the model file, by operations, and what it brings."""
    if dims.num_stages == 1:
        return "nothing to split: set --pipeline-model-parallel-size"
    best, work, excess = _compare_split(config, dims)
    return (
        f'"pipeline_num_layers": {best}\n'
        f"# the slowest process has {work / 1e12:.3g} TFLOPs per sample forward; now, with {list(dims.layers)}, "
        f"{excess:.1%} more"
    )


def check_split(config: RunConfig, dims: ParallelDims) -> str | None:
    """Return a line about a split whose slowest process has much more to do than it must, or None.

    Raises:
        InputError: it has more than twice as much to do.
    """
    if dims.num_stages == 1:
        return None
    best, _, excess = _compare_split(config, dims)
    words = (
        f"with {list(dims.layers)} layers per stage the slowest process has {excess:.0%} more to do than with {best}"
    )
    if excess > 1:
        raise InputError(f"{words}, and the others wait: set predictor.pipeline_num_layers to that")
    return f"{words} (predictor.pipeline_num_layers)" if excess > 0.25 else None


def _compare_split(config: RunConfig, dims: ParallelDims) -> tuple[str, float, float]:
    """Return the best split as it is written, the operations of its slowest process, and the excess of the layout's."""
    operations = count_operations(config.model.predictor, config.latent_shape)
    processes, virtual = dims.pipeline, dims.num_stages // dims.pipeline
    layer, first, last = operations.layer, operations.first, operations.head
    best = best_split(operations.num_layers, processes, virtual, layer=layer, first=first, last=last)

    def slowest(split: Sequence[int]) -> float:
        costs = [n * layer for n in split]
        costs[0] += first
        costs[-1] += last
        return max(sum(costs[rank::processes]) for rank in range(processes))

    pieces = [list(best[i : i + processes]) for i in range(0, len(best), processes)]
    written = json.dumps(pieces if virtual > 1 else pieces[0])
    return written, slowest(best), slowest(dims.layers) / slowest(best) - 1


@dataclass(frozen=True)
class Memory:
    """Bytes of one process.

    Attributes:
        weights: fp32, its shards.
        gradients: fp32, the same.
        optimizer: AdamW's two moments.
        average: the moving average.
        gathered: weights that are whole for a while, in the dtype of computation.
        activations: what autograd keeps of all micro batches in flight.
        recomputed: what the layers that the backward pass computes again at a time keep in the meantime.
    """

    weights: float
    gradients: float
    optimizer: float
    average: float
    gathered: float
    activations: float
    recomputed: float

    @property
    def total(self) -> float:
        """All of it; what kernels and the frozen encoders need comes on top."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class ProcessCost:
    """What a pipeline's process holds.

    Attributes:
        parameters: of its stages, before sharding over data parallel processes.
        memory: predicted.
    """

    parameters: int
    memory: Memory


def predict(config: RunConfig, dims: ParallelDims) -> list[ProcessCost]:
    """Predict what each process of a pipeline holds; its data, context and tensor parallel neighbours hold as much.

    Parameters are those of the real modules; activations are what autograd keeps when these run on the meta device,
    with attention that keeps its inputs, output and sums. Context parallelism divides activations; that tensor
    parallelism divides some of them, and that skipped attention keeps its output, is not counted.
    With --fsdp-cpu-offload the shards are the host's and count 0.
    """
    from flashi2v_train.tracing import build_stage, kept_bytes  # torch and diffusers take seconds

    options = config.options
    shards = dims.data // dims.replicas * dims.context
    on_device = 0 if options.fsdp_cpu_offload else 1
    gathers = shards > 1 or config.bf16 or options.fsdp_cpu_offload
    costs = []
    for rank in range(dims.pipeline):
        numbers = dims.stages_of(rank)
        stages = [build_stage(config, dims, number) for number in numbers]
        sizes = [_stage_sizes(stage, dims.tensor) for stage in stages]
        whole, trained = sum(size.all for size in sizes), sum(size.trained for size in sizes)
        # Two blocks at a time: one computes while the next is fetched.
        gathered = (sum(s.root for s in sizes) + 2 * max(s.block for s in sizes)) if options.reshards else whole
        kept = sum(kept_bytes(stage, config) for stage in stages) / len(stages)
        costs.append(
            ProcessCost(
                whole,
                Memory(
                    weights=on_device * 4 * whole / shards,
                    gradients=on_device * 4 * trained / shards,
                    optimizer=on_device * 8 * trained / shards,
                    average=on_device * 4 * whole / shards if options.use_ema else 0,
                    gathered=(2 if config.bf16 else 4) * gathered if gathers else 0,
                    activations=kept * in_flight(config, dims, rank) / dims.context,
                    recomputed=_recomputed_bytes(config, dims, numbers) / dims.context,
                ),
            )
        )
    return costs


def _recomputed_bytes(config: RunConfig, dims: ParallelDims, stages: range) -> float:
    """Return what the largest group of layers that is computed again at a time keeps, of one micro batch."""
    from flashi2v_train.tracing import build_stage, kept_bytes

    options = config.options
    whole, partly = options.recompute_num_layers or 0, options.recompute_num_layers_skip_core_attention
    if not (whole or partly):
        return 0  # attention that is computed again is gone as fast as it came

    def kept(layers: int) -> int:
        """Keep what a run does that computes only the first `layers` of a stage again."""
        changes = {
            "recompute_granularity": "full" if layers else None,
            "recompute_method": "block" if layers else None,
            "recompute_num_layers": layers or None,
            "recompute_skip_core_attention": False,
            "recompute_num_layers_skip_core_attention": 0,
        }
        plain = replace(config, options=options.model_copy(update=changes))
        return kept_bytes(build_stage(plain, dims, stages[0]), plain)

    group = whole if options.recompute_method == "uniform" else 1
    return (kept(0) - kept(1)) * min(group, max(dims.layers[number] for number in stages))


def in_flight(config: RunConfig, dims: ParallelDims, rank: int) -> int:
    """Return how many micro batches a process keeps activations of at a time, counted once for each of its stages.

    It is what the schedules of torch.distributed.pipelining do.
    """
    number, virtual = config.micro_batches(dims), dims.num_stages // dims.pipeline
    if dims.pipeline == 1:
        return 1
    schedule = config.options.pipeline_schedule
    if schedule == "gpipe":
        return number * virtual
    round_size = number // max(1, number // dims.pipeline)
    earlier = (virtual - 1) * round_size
    behind = dims.pipeline - rank - 1
    if schedule == "zero-bubble":
        behind = dims.pipeline - 1  # gradients of weights wait, and with them what they are computed from
    elif virtual > 1:
        behind *= 2
    return min(number * virtual, earlier + behind + 1)


@dataclass(frozen=True)
class _Sizes:
    all: int
    trained: int
    block: int  # the largest block
    root: int  # what is in no block


def _stage_sizes(stage: "Stage", tensor: int) -> _Sizes:
    """Count a stage's parameters; matrices of blocks are shared among `tensor` processes."""

    def count(name: str, numel: int) -> int:
        shared = name.startswith("blocks.") and any(part in name for part in (".attn1.", ".attn2.", ".ffn."))
        return numel // tensor if shared else numel

    named = [(name, p.requires_grad, count(name, p.numel())) for name, p in stage.transformer.named_parameters()]
    blocks: dict[str, int] = {}
    for name, _, number in named:
        if name.startswith("blocks."):
            block = name.split(".")[1]
            blocks[block] = blocks.get(block, 0) + number
    total = sum(number for _, _, number in named)
    return _Sizes(
        total, sum(number for _, trains, number in named if trains), max(blocks.values()), total - sum(blocks.values())
    )


def count_parameters(config: RunConfig) -> dict[str, int]:
    """Count the parameters of the transformer by part: embeddings, latent shift, layers, head."""
    from flashi2v_train.tracing import build_stage

    alone = ParallelDims(
        tensor=1, context=1, pipeline=1, data=1, replicas=1, layers=(config.model.predictor.num_layers,)
    )
    counts = dict.fromkeys(_PARTS.values(), 0)
    for name, parameter in build_stage(config, alone, 0).transformer.named_parameters():
        counts[_PARTS.get(name.split(".")[0], "embeddings")] += parameter.numel()
    return counts


_PARTS = {
    "patch_embedding": "embeddings",
    "fourier_embedding": "embeddings",
    "condition_embedder": "embeddings",
    "learnable_proj": "latent shift",
    "blocks": "layers",
    "proj_out": "head",
    "scale_shift_table": "head",
}


def describe_run(config: RunConfig, dims: ParallelDims) -> str:
    """Return what `--dry-run` prints."""
    options = config.options
    operations = count_operations(config.model.predictor, config.latent_shape)
    micro_batches = config.micro_batches(dims)
    samples = micro_batches * options.micro_batch_size * dims.data
    lines = [
        json.dumps(config.as_dict(), indent=1),  # as it would be written to config.json
        "",
        f"parallel     {dims.describe()}" + (f"; {dims.world_size} processes" if dims.world_size > 1 else ""),
        f"batch        samples per step: {samples} = {dims.data} (data parallel) x {micro_batches} (micro batches) x "
        f"{options.micro_batch_size} (micro batch size)",
        f"tokens       {num_tokens(config)} per sample, latents (C, F, H, W) = {config.latent_shape}",
        f"operations   {operations.training / 1e12:.4g} TFLOPs per sample, "
        f"{operations.training * samples / 1e12:.4g} per step, forward and backward",
        "parameters   "
        + ", ".join(f"{name} {number / 1e6:.2f} M" for name, number in count_parameters(config).items()),
    ]
    again = count_recomputed(config, dims)
    if again:
        lines.append(
            f"recompute    {again / 1e12:.4g} TFLOPs per sample more, {again / operations.training:.0%}, to save memory"
        )
    if dims.pipeline > 1:
        share = bubble(dims.pipeline, micro_batches, dims.num_stages // dims.pipeline)
        lines.append(f"bubble       {share:.1%} of a step in theory, if all stages take equally long")
    kinds = [field.name for field in fields(Memory)]
    lines += ["", f"{'GiB per process':<16}{'parameters':>12}" + "".join(f"{kind:>13}" for kind in [*kinds, "total"])]
    for rank, cost in enumerate(predict(config, dims)):
        name = "all" if dims.pipeline == 1 else f"stage {', '.join(map(str, dims.stages_of(rank)))}"
        sizes = [getattr(cost.memory, kind) / GIB for kind in [*kinds, "total"]]
        lines.append(f"{name:<16}{cost.parameters / 1e6:>10.1f} M" + "".join(f"{size:>13.2f}" for size in sizes))
    lines.append("activations are what autograd keeps; kernels' own memory and the frozen encoders come on top")
    return "\n".join(lines)

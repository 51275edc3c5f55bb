"""What a run will cost: parameters, operations and memory, read off the real modules before anything starts.

They are built on the meta device, where tensors have shapes and no numbers; `flashi2v_model.cost` counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import prod

import torch
from torch import Tensor

from flashi2v_model import FlashI2VTransformer3DModel
from flashi2v_model.cost import Operations, count_operations, kept_bytes
from flashi2v_train.config import RunConfig
from flashi2v_train.lora import plan_adapters
from flashi2v_train.optim import freeze
from flashi2v_train.parallel_dims import ParallelDims
from flashi2v_train.parallelise import Stage, keep_layers
from flashi2v_train.recipe import example
from flashi2v_train.recompute import save_memory

_META = torch.device("meta")


def operations_of(config: RunConfig) -> Operations:
    """Count the operations of one sample."""
    return operations_of_kinds([config])[0]


def operations_of_kinds(kinds: Sequence[RunConfig]) -> list[Operations]:
    """Count the operations of one sample each of configurations that differ in its shape alone."""
    adapts = kinds[0].options.trains_adapters
    network, trained = build_network(kinds[0]), _trained(kinds[0]) if adapts else None
    found = []
    for config in kinds:
        inputs = {name: tensor.to(_META) for name, tensor in example(config)[0].items()}
        operations = count_operations(network, inputs)
        if trained is not None:
            weights = operations.forward - operations.num_layers * operations.attention
            operations = replace(count_operations(trained, inputs), frozen=weights)
        found.append(operations)
    return found


def build_network(config: RunConfig) -> FlashI2VTransformer3DModel:
    """Build the whole network on the meta device."""
    with _META:
        return config.recipe.build(config.model.predictor)


def _trained(config: RunConfig) -> FlashI2VTransformer3DModel:
    """Build the whole network as it is trained."""
    network = build_network(config)
    if (adapters := plan_adapters(config)) is None:
        freeze(network, config.options.freeze)
    else:
        with _META:
            adapters.apply(network)
    return network


def count_recomputed(config: RunConfig, dims: ParallelDims) -> float:
    """Return the operations of one sample that the backward pass does again to save memory."""
    options = config.options
    operations = operations_of(config)
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


def count_parameters(config: RunConfig) -> dict[str, int]:
    """Count the parameters of the transformer by part: embeddings, latent shift, layers, head."""
    parts = {"learnable_proj": "latent shift", "blocks": "layers", "proj_out": "head", "scale_shift_table": "head"}
    counts = dict.fromkeys(("embeddings", *parts.values()), 0)
    for name, parameter in build_network(config).named_parameters():
        counts[parts.get(name.split(".")[0], "embeddings")] += parameter.numel()
    return counts


@dataclass(frozen=True)
class Memory:
    """Bytes of one process.

    Attributes:
        weights: its shards, in fp32; of a model that is not trained in the dtype of computation, or in 8 bits.
        gradients: fp32, of what is trained.
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
    options = config.options
    shards = dims.data // dims.replicas * dims.context
    on_device = 0 if options.fsdp_cpu_offload else 1
    gathers = shards > 1 or config.bf16 or options.fsdp_cpu_offload
    costs = []
    for rank in range(dims.pipeline):
        numbers = dims.stages_of(rank)
        stages = [build_stage(config, dims, number) for number in numbers]
        sizes = [_stage_sizes(stage, dims.tensor, config) for stage in stages]
        trained = sum(size.trained for size in sizes)
        averaged = trained if options.trains_adapters else sum(size.all for size in sizes)
        # Two blocks at a time: one computes while the next is fetched.
        gathered = sum(s.root for s in sizes) + (
            2 * max(s.block for s in sizes) if options.reshards else sum(s.blocks for s in sizes)
        )
        kept = sum(_kept_bytes(stage, config) for stage in stages) / len(stages)
        costs.append(
            ProcessCost(
                sum(size.all for size in sizes),
                Memory(
                    weights=on_device * sum(size.stored for size in sizes) / shards,
                    gradients=on_device * 4 * trained / shards,
                    optimizer=on_device * 8 * trained / shards,
                    average=on_device * 4 * averaged / shards if options.use_ema else 0,
                    gathered=(gathered if gathers else 0) + max(size.unpacked for size in sizes),
                    activations=kept * in_flight(config, dims, rank) / dims.context,
                    recomputed=_recomputed_bytes(config, dims, numbers) / dims.context,
                ),
            )
        )
    return costs


def _recomputed_bytes(config: RunConfig, dims: ParallelDims, stages: range) -> float:
    """Return what the largest group of layers that is computed again at a time keeps, of one micro batch."""
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
        return _kept_bytes(build_stage(plain, dims, stages[0]), plain)

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


def build_stage(config: RunConfig, dims: ParallelDims, number: int) -> Stage:
    """Build a pipeline stage on the meta device.

    Raises:
        InputError: `--freeze` names no parameter, or what is said of adapters does not fit.
    """
    part = _trained(config)
    if dims.num_stages > 1:
        part = keep_layers(part, dims.layers_of(number), embeds=number == 0, projects=number == dims.num_stages - 1)
    return Stage(part.train(), config.latent_shape, tuple(example(config)[0]))


def _kept_bytes(stage: Stage, config: RunConfig) -> int:
    """Return the bytes that autograd keeps of one micro batch, weights apart; the stage is changed by it."""
    options = config.options.model_copy(update={"compile": False})
    save_memory(stage.transformer, options, offload_attention=False, device=_META)
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    stage.transformer.to(dtype)
    inputs = _inputs(stage, config, dtype)
    return kept_bytes(lambda: stage(*inputs), stage)


def _inputs(stage: Stage, config: RunConfig, dtype: torch.dtype) -> tuple[Tensor, ...]:
    predictor, batch = config.model.predictor, config.options.micro_batch_size
    if stage.embeds:
        inputs = example(config)[0]
        return tuple(inputs[name].to(_META).repeat_interleave(batch, dim=0) for name in stage.names)
    dim, tokens = predictor.hidden_size, stage.grid[0] * stage.grid[1] * stage.grid[2]
    with _META:
        x, text = torch.empty(batch, tokens, dim, dtype=dtype), torch.empty(batch, predictor.text_len, dim, dtype=dtype)
        time, modulation = torch.empty(batch, dim), torch.empty(batch, 6, dim)
    return tuple(tensor.requires_grad_() for tensor in (x, text, time, modulation))


@dataclass(frozen=True)
class _Sizes:
    """Of a stage: numbers of parameters, then bytes of what is stored, gathered, and unpacked from 8 bits."""

    all: int
    trained: int
    stored: int
    block: int  # the largest block, gathered
    blocks: int
    root: int  # what is in no block
    unpacked: int  # the largest matrix


def _stage_sizes(stage: Stage, tensor: int, config: RunConfig) -> _Sizes:
    """Count a stage's parameters; matrices of blocks are shared among `tensor` processes."""
    computed = 2 if config.bf16 else 4  # bytes
    total = trained = stored = root = unpacked = 0
    blocks: dict[str, int] = {}
    for name, parameter in stage.transformer.named_parameters():
        shared = name.startswith("blocks.") and any(part in name for part in (".attn1.", ".attn2.", ".ffn."))
        number, size = parameter.numel() // (tensor if shared else 1), parameter.element_size()
        total += number
        trained += number if parameter.requires_grad else 0
        stored += number * size
        if name.startswith("blocks."):
            block = name.split(".")[1]
            blocks[block] = blocks.get(block, 0) + number * min(size, computed)
        else:
            root += number * min(size, computed)
        if not parameter.is_floating_point():
            unpacked = max(unpacked, number * computed)
    return _Sizes(total, trained, stored, max(blocks.values()), sum(blocks.values()), root, unpacked)

"""How one model and one batch are spread over processes: degrees and splits, as plain numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

from flashi2v_data.errors import InputError
from flashi2v_model.parallel.degrees import ContextDegrees, choose_degrees
from flashi2v_train.options import ParallelOptions


@dataclass(frozen=True)
class ParallelDims:
    """Degrees of parallelism.

    Attributes:
        tensor: processes that share each layer's matrices.
        context: processes that share the tokens of a video.
        pipeline: processes that share the layers.
        data: processes (or groups of the above) that have samples of their own.
        replicas: groups of data parallel processes that each hold all shards of the weights; divides `data`.
        layers: layers of every pipeline stage; stage number v * pipeline + p is the v-th piece of process p.
        ring: of the context parallel processes, groups that pass keys on; those of a group exchange heads (Ulysses).
    """

    tensor: int
    context: int
    pipeline: int
    data: int
    replicas: int
    layers: tuple[int, ...]
    ring: int = 1

    @property
    def world_size(self) -> int:
        """All processes."""
        return self.tensor * self.context * self.pipeline * self.data

    @property
    def ulysses(self) -> int:
        """Of the context parallel processes, those that exchange heads."""
        return self.context // self.ring

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline, over all processes."""
        return len(self.layers)

    def stages_of(self, pipeline_rank: int) -> range:
        """Return the numbers of a process's stages."""
        return range(pipeline_rank, self.num_stages, self.pipeline)

    def layers_of(self, stage: int) -> range:
        """Return the numbers of a stage's layers, counted over the whole model."""
        first = sum(self.layers[:stage])
        return range(first, first + self.layers[stage])

    def describe(self) -> str:
        """Return the degrees in words."""
        degrees = {
            "data": self.data,
            "pipeline": self.pipeline,
            "context": self.context,
            "tensor": self.tensor,
        }
        words = " x ".join(f"{name} {degree}" for name, degree in degrees.items() if degree > 1) or "one process"
        if self.ring > 1:
            words += f" ({ContextDegrees(self.ulysses, self.ring)})"
        if self.replicas > 1:
            words += f"; {self.replicas} replicas of the weights"
        if self.num_stages > 1:
            words += f"; layers per stage {list(self.layers)}"
        return words


Split = Sequence[int] | Sequence[Sequence[int]]


def plan_parallel_dims(
    options: ParallelOptions, world_size: int, *, num_layers: int, num_heads: int, split: Split | None
) -> ParallelDims:
    """Work out the layout of a run.

    Args:
        options: the degrees that the user chose.
        world_size: number of processes.
        num_layers: of the model.
        num_heads: of its attention.
        split: `pipeline_num_layers`, layers per pipeline process, or a list of such lists for virtual stages.

    Raises:
        InputError: the numbers do not fit each other; the message says which to change.
    """
    tensor, context, pipeline = (
        options.tensor_model_parallel_size,
        options.context_parallel_size,
        options.pipeline_model_parallel_size,
    )
    model_size = tensor * context * pipeline
    if world_size % model_size:
        raise InputError(
            f"--tensor-model-parallel-size {tensor} x --context-parallel-size {context} x "
            f"--pipeline-model-parallel-size {pipeline} = {model_size} must divide the {world_size} processes of "
            "this run: change one of them, or --nproc-per-node"
        )
    if num_heads % tensor:
        raise InputError(f"--tensor-model-parallel-size {tensor} must divide the {num_heads} attention heads")
    degrees = _context_degrees(options, num_heads // tensor)
    data = world_size // model_size
    instances = options.num_distributed_optimizer_instances
    if data % instances:
        raise InputError(
            f"--num-distributed-optimizer-instances {instances} must divide the {data} data parallel processes"
        )
    if instances > 1 and not options.use_distributed_optimizer:
        raise InputError("--num-distributed-optimizer-instances has no effect with --no-use-distributed-optimizer")
    replicas = instances if options.use_distributed_optimizer else data
    return ParallelDims(tensor, context, pipeline, data, replicas, _layers(options, num_layers, split), degrees.ring)


def _context_degrees(options: ParallelOptions, num_heads: int) -> ContextDegrees:
    """Return how processes share the tokens of a video, each with so many heads before they exchange them."""
    size, algorithm, ulysses = (
        options.context_parallel_size,
        options.context_parallel_algo,
        options.ulysses_degree_in_cp,
    )
    if ulysses is not None and algorithm != "hybrid_cp_algo":
        raise InputError("--ulysses-degree-in-cp has no effect without --context-parallel-algo hybrid_cp_algo")
    asked = {"ulysses_cp_algo": size, "megatron_cp_algo": 1}.get(algorithm or "", ulysses)
    try:
        return choose_degrees(size, num_heads, asked)
    except ValueError as error:
        raise InputError(f"--context-parallel-size {size}: {error}") from None


def _layers(options: ParallelOptions, num_layers: int, split: Split | None) -> tuple[int, ...]:
    """Return the number of layers of every stage, in the order in which data passes through them."""
    pipeline, virtual = options.pipeline_model_parallel_size, options.virtual_pipeline_model_parallel_size
    schedule = options.pipeline_schedule
    if pipeline == 1:
        for name in ("virtual_pipeline_model_parallel_size", "pipeline_schedule"):
            if getattr(options, name) not in (None, 1):
                raise InputError(f"--{name.replace('_', '-')} has no effect without --pipeline-model-parallel-size")
        return (num_layers,)
    nested = split is not None and any(isinstance(part, Sequence) for part in split)
    if split is None:
        layers = even_split(num_layers, pipeline * (virtual or 1))
    elif nested:
        pieces = [list(piece) if isinstance(piece, Sequence) else [piece] for piece in split]
        if any(len(piece) != pipeline for piece in pieces):
            raise InputError(
                f"predictor.pipeline_num_layers {pieces}: every list must have one number for each of the "
                f"{pipeline} processes of --pipeline-model-parallel-size"
            )
        if virtual not in (None, len(pieces)):
            raise InputError(
                f"predictor.pipeline_num_layers has {len(pieces)} lists, --virtual-pipeline-model-parallel-size is "
                f"{virtual}: make them equal, or leave the option out"
            )
        layers = tuple(number for piece in pieces for number in piece)
    else:
        layers = tuple(number for number in split if isinstance(number, int))
        if len(layers) != pipeline * (virtual or 1):
            raise InputError(
                f"predictor.pipeline_num_layers {list(layers)} has {len(layers)} numbers, there are "
                f"{pipeline * (virtual or 1)} stages (--pipeline-model-parallel-size {pipeline}"
                + (f" x --virtual-pipeline-model-parallel-size {virtual})" if virtual else ")")
            )
    if sum(layers) != num_layers:
        raise InputError(f"predictor.pipeline_num_layers sums to {sum(layers)}, num_layers is {num_layers}")
    if min(layers) < 1:
        raise InputError(f"layers per stage {list(layers)}: every pipeline stage needs at least one layer")
    if len(layers) > pipeline and schedule in ("gpipe", "1f1b"):
        raise InputError(f"--pipeline-schedule {schedule} has one stage per process: leave virtual stages out")
    if len(layers) == pipeline and schedule == "interleaved":
        raise InputError(
            "--pipeline-schedule interleaved needs virtual stages: set --virtual-pipeline-model-parallel-size, "
            "or pipeline_num_layers to a list of lists"
        )
    return layers


def even_split(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Share layers out as evenly as they go, the longer stages in the middle.

    Raises:
        InputError: there are more stages than layers.
    """
    if num_stages > num_layers:
        raise InputError(f"{num_layers} layers cannot be split into {num_stages} pipeline stages")
    least, rest = divmod(num_layers, num_stages)
    first = (num_stages - rest) // 2
    return tuple(least + (first <= stage < first + rest) for stage in range(num_stages))

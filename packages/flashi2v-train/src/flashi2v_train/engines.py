"""What runs the transformer's stages: directly, or in a pipeline of processes.

B batch, C latent channels, F latent frames, H W latent grid, M micro batches.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
)

from flashi2v_train.batch import Batch, Series, chunk, join, pick
from flashi2v_train.config import RunConfig
from flashi2v_train.cost import build_stage
from flashi2v_train.parallel_dims import ParallelDims
from flashi2v_train.parallelise import Stage
from flashi2v_train.recipe import Recipe, example
from flashi2v_train.world import World


class Engine(ABC):
    """What runs the stages of this process, together with those of the others."""

    @abstractmethod
    def train(self, series: Series | None) -> Tensor:
        """Run forward and backward over all micro batches of an optimizer step; gradients are left to be used.

        Args:
            series: micro batches of this data parallel rank, where the first stage is; elsewhere None.

        Returns:
            a number, whose mean over data parallel ranks is the mean loss of all samples of the global batch; 0 where
            the last stage is not.
        """

    @abstractmethod
    def velocity(self, inputs: Batch | None) -> Tensor:
        """Run forward only, without gradients.

        Args:
            inputs: of one micro batch, where the first stage is; elsewhere None.

        Returns:
            (B, C, F, H, W) in fp32, on every process.
        """


def build_engine(config: RunConfig, world: World, stages: Sequence[Stage]) -> Engine:
    """Return what runs a run's stages."""
    options, dims = config.options, world.dims
    if dims.num_stages == 1:
        return DirectEngine(stages[0], config.recipe, dims.data)
    schedule = options.pipeline_schedule or ("interleaved" if dims.num_stages > dims.pipeline else "1f1b")
    return PipelineEngine(stages, world, config, schedule)


class DirectEngine(Engine):
    """One stage, which is the whole model.

    Args:
        stage: perhaps sharded.
        recipe: what is learnt.
        num_ranks: data parallel ones.
    """

    def __init__(self, stage: Stage, recipe: Recipe, num_ranks: int = 1) -> None:
        self._stage, self._recipe, self._num_ranks = stage, recipe, num_ranks

    def train(self, series: Series | None) -> Tensor:
        assert series is not None
        total: Tensor | float = 0.0
        for batch in series.batches:
            velocity = self._stage(*pick(self._recipe.inputs(batch), self._stage.names))
            losses = self._recipe.loss(velocity, self._recipe.target(batch))
            loss = losses.mean() * (self._num_ranks * len(losses) / sum(series.counts))
            loss.backward()
            total += loss.detach()
        assert isinstance(total, Tensor)
        return total

    @torch.no_grad()
    def velocity(self, inputs: Batch | None) -> Tensor:
        assert inputs is not None
        velocity: Tensor = self._stage(*pick(inputs, self._stage.names))
        release_weights(self._stage)
        return velocity


class PipelineEngine(Engine):
    """Stages on several processes, and micro batches that pass through them in the order of a schedule.

    Args:
        stages: those of this process, in order; each perhaps sharded.
        world: this process among all.
        config: of the run.
        schedule: as of `--pipeline-schedule`.
    """

    def __init__(self, stages: Sequence[Stage], world: World, config: RunConfig, schedule: str) -> None:
        self._stages, self._world, self._config, self._name = stages, world, config, schedule
        self._num_micro_batches = config.micro_batches(world.dims)
        self._targets: list[Batch] = []  # of the micro batches that run, where the last stage is
        self._weight = 1.0  # of each
        self._passed = passed_on(config, world.dims)
        # Buffers between stages belong to a schedule, so that each has stages of its own; that of the last shape is
        # kept, as the next one often is the same.
        self._schedule = lru_cache(1)(self._make_schedule)
        main = config.kinds.index(config.main_kind)
        with torch.no_grad():
            self._forward = make_schedule("gpipe", self._wrap(main, config.options.micro_batch_size), 1, None)
        self._reducers = [
            PipelineStage(stage, number, world.dims.num_stages, world.device, group=world.pipeline_group)
            for stage, number in zip(stages, world.dims.stages_of(world.pipeline_rank), strict=True)
        ]

    def _make_schedule(self, bucket: int, size: int, number: int) -> PipelineScheduleSingle | PipelineScheduleMulti:
        """Make what runs a number of micro batches of one shape, each of so many samples."""
        processes = self._world.dims.pipeline
        # Too few of one shape, or not in equal rounds: each stage runs all of them in turn.
        fits = number >= processes and number % max(1, number // processes) == 0
        return make_schedule(self._name if fits else "gpipe", self._wrap(bucket, size), number, self._loss_of)

    def _wrap(self, bucket: int, size: int) -> list[PipelineStage]:
        """Say what the stages of this process are given and return, for micro batches of a shape and size."""
        world, kind = self._world, self._config.kinds[bucket]
        group, num_tokens = world.context.all, math.prod(self._grid(bucket))
        own = len(torch.arange(num_tokens).tensor_split(group.size())[group.rank()])
        needs = torch.is_grad_enabled()

        def sized(ones: Sequence[Tensor], has_tokens: bool) -> tuple[Tensor, ...]:
            shapes = [(size, *one.shape[1:]) for one in ones]
            shapes[:1] = [(size, own, *ones[0].shape[2:])] if has_tokens else shapes[:1]
            made = [torch.empty(shape, dtype=one.dtype, device="meta") for shape, one in zip(shapes, ones)]
            return tuple(new.requires_grad_(needs and one.requires_grad) for new, one in zip(made, ones))

        first = pick(example(kind)[0], self._stages[0].names)
        last = torch.empty(1, *kind.latent_shape, requires_grad=True)
        between = [sized(first, False), *(sized(ones, True) for ones in self._passed), sized([last], False)]
        return [
            PipelineStage(
                Unsharded(stage),
                number,
                world.dims.num_stages,
                world.device,
                input_args=between[number],
                output_args=between[number + 1],
                group=world.pipeline_group,
            )
            for stage, number in zip(self._stages, world.dims.stages_of(world.pipeline_rank), strict=True)
        ]

    def _loss_of(self, velocity: Tensor, number: Tensor) -> Tensor:
        """Return the weighted loss of a micro batch; torch hands on one tensor, so it is its number, on the CPU."""
        return self._config.recipe.loss(velocity, self._targets[int(number)]).mean() * self._weight

    def train(self, series: Series | None) -> Tensor:
        shapes, num_samples = self._share_shapes(series)
        losses: list[Tensor] = []
        sharded = [stage for stage in self._stages if isinstance(stage, FSDPModule)]
        for stage in sharded:  # gradients are reduced once, however many schedules there are
            stage.set_is_last_backward(False)
            stage.set_reshard_after_backward(False)
            stage.set_requires_gradient_sync(False)
        for bucket, size in dict.fromkeys(shapes):  # one schedule after the other, as each has one shape
            numbers = [number for number, shape in enumerate(shapes) if shape == (bucket, size)]
            batch = None if series is None else join([series.batches[number] for number in numbers])
            self._weight = self._world.dims.data * size / num_samples
            losses += self._run(bucket, size, len(numbers), batch)
        for reducer in self._reducers:
            reducer.perform_reduce_grad(1)
        return torch.stack(losses).sum() if losses else torch.zeros((), device=self._world.device)

    def _share_shapes(self, series: Series | None) -> tuple[list[tuple[int, int]], int]:
        """Tell all stages shape and size of every micro batch, and how many samples the global batch has."""
        options, world = self._config.options, self._world
        if len(self._config.kinds) == 1:
            size = options.micro_batch_size
            return [(0, size)] * self._num_micro_batches, size * self._num_micro_batches * world.dims.data
        known = torch.zeros(self._num_micro_batches + 1, 2, dtype=torch.int64)
        if series is not None:
            sizes = [len(batch["latents"]) for batch in series.batches]
            known = torch.tensor([*zip(series.buckets, sizes, strict=True), (sum(series.counts), 0)])
        known = known.to(world.device)
        dist.broadcast(known, group=world.pipeline_group, group_src=0)
        *shapes, (num_samples, _) = map(tuple, known.tolist())
        return shapes, num_samples

    def _run(self, bucket: int, size: int, number: int, batch: Batch | None) -> list[Tensor]:
        """Run some micro batches of one shape; return their weighted losses, where the last stage is."""
        recipe, losses = self._config.recipe, list[Tensor]()
        self._send_target(bucket, size, number, None if batch is None else recipe.target(batch))
        for stage in self._stages:
            stage.grid = self._grid(bucket)
        arguments = () if batch is None else pick(recipe.inputs(batch), self._stages[0].names)
        numbers = torch.arange(number) if self._world.projects else None
        self._schedule(bucket, size, number).step(*arguments, target=numbers, losses=losses, return_outputs=False)
        return [loss.detach() for loss in losses]

    def _grid(self, bucket: int) -> tuple[int, int, int]:
        return self._stages[0].transformer.token_grid((1, *self._config.kinds[bucket].latent_shape))

    def _send_target(self, bucket: int, size: int, number: int, target: Batch | None) -> None:
        """Send the target from the first stage, where the features are, to the last, where the loss is."""
        world, last = self._world, self._world.dims.pipeline - 1
        if target is not None:
            for tensor in target.values():
                dist.send(tensor.contiguous(), group=world.pipeline_group, group_dst=last)
        elif world.projects:
            received = {
                name: torch.empty(size * number, *one.shape[1:], dtype=one.dtype, device=world.device)
                for name, one in example(self._config.kinds[bucket])[1].items()
            }
            for tensor in received.values():
                dist.recv(tensor, group=world.pipeline_group, group_src=0)
            self._targets = chunk(received, number)

    def velocity(self, inputs: Batch | None) -> Tensor:
        world = self._world
        for stage in self._stages:
            stage.grid = stage.transformer.token_grid((1, *self._config.latent_shape))
        output = self._forward.eval(*(() if inputs is None else pick(inputs, self._stages[0].names)))
        for stage in self._stages:
            release_weights(stage)
        shape = (self._config.options.micro_batch_size, *self._config.latent_shape)
        velocity = output if world.projects else torch.empty(shape, device=world.device)
        assert isinstance(velocity, Tensor)
        dist.broadcast(velocity, group=world.pipeline_group, group_src=world.dims.pipeline - 1)
        return velocity


class Unsharded(nn.Module):
    """What a schedule sees of a stage: not that it is sharded, which `PipelineEngine` attends to itself."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self._hidden = (stage,)

    def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        outputs: Tensor | tuple[Tensor, ...] = self._hidden[0](*tensors)
        return outputs

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Return those of the stage, for whose gradients zero-bubble asks."""
        return self._hidden[0].parameters(recurse)


def passed_on(config: RunConfig, dims: ParallelDims) -> list[tuple[Tensor, ...]]:
    """Return what each stage but the last passes on of one sample: on the meta device, with dtypes and gradients.

    With buckets, of the main one.
    """
    given, passed = pick(example(config)[0], tuple(example(config)[0])), []
    given = tuple(tensor.to("meta") for tensor in given)
    for number in range(dims.num_stages - 1):
        stage = build_stage(config, dims, number)
        if config.bf16:
            stage.transformer.to(torch.bfloat16)
        stage.grid = stage.transformer.token_grid((1, *config.latent_shape))
        given = tuple(one.detach().requires_grad_(one.requires_grad) for one in stage(*given))
        passed.append(given)
    return passed


def release_weights(stage: nn.Module) -> None:
    """Free the gathered weights that a forward pass without a backward one leaves (FSDP2)."""
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def make_schedule(
    name: str,
    stages: Sequence[PipelineStage],
    num_micro_batches: int,
    loss: Callable[[Tensor, Tensor], Tensor] | None,
) -> PipelineScheduleSingle | PipelineScheduleMulti:
    """Return a schedule over the stages of this process; gradients are sums over the micro batches.

    Args:
        name: as of `--pipeline-schedule`; "gpipe" with several stages runs each over all micro batches in turn.
        stages: of this process.
        num_micro_batches: M.
        loss: from the last stage's output and the target; None runs forward only.
    """
    if name == "zero-bubble":
        return ScheduleInterleavedZeroBubble([*stages], num_micro_batches, loss, scale_grads=False)
    if len(stages) == 1:
        single = ScheduleGPipe if name == "gpipe" else Schedule1F1B
        return single(stages[0], num_micro_batches, loss, scale_grads=False)
    several = ScheduleLoopedBFS if name == "gpipe" else ScheduleInterleaved1F1B
    return several([*stages], num_micro_batches, loss, scale_grads=False)

"""What runs the transformer's stages: directly, or in a pipeline of processes.

B batch, C latent channels, F latent frames, H W latent grid, M micro batches.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

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

from flashi2v_train.batch import Batch, chunk, pick
from flashi2v_train.config import RunConfig
from flashi2v_train.parallelise import Stage
from flashi2v_train.recipe import example
from flashi2v_train.world import World

# From a predicted velocity and the recipe's target of a micro batch to the loss of every sample, (B,).
Loss = Callable[[Tensor, Batch], Tensor]


class Engine(ABC):
    """What runs the stages of this process, together with those of the others."""

    @abstractmethod
    def train(self, batch: tuple[Batch, Batch] | None) -> Tensor:
        """Run forward and backward over all micro batches of an optimizer step; gradients are left to be used.

        Args:
            batch: the recipe's inputs and target of all samples of this data parallel rank, where the first stage is;
                elsewhere None.

        Returns:
            the mean loss, a number; 0 where the last stage is not.
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
        return DirectEngine(stages[0], config.micro_batches(dims), config.recipe.loss)
    schedule = options.pipeline_schedule or ("interleaved" if dims.num_stages > dims.pipeline else "1f1b")
    return PipelineEngine(stages, world, config, schedule)


class DirectEngine(Engine):
    """One stage, which is the whole model.

    Args:
        stage: perhaps sharded.
        num_micro_batches: M, per optimizer step.
        loss: the recipe's.
    """

    def __init__(self, stage: Stage, num_micro_batches: int, loss: Loss) -> None:
        self._stage, self._num_micro_batches, self._loss = stage, num_micro_batches, loss

    def train(self, batch: tuple[Batch, Batch] | None) -> Tensor:
        assert batch is not None
        inputs, targets = (chunk(part, self._num_micro_batches) for part in batch)
        total: Tensor | float = 0.0
        for given, wanted in zip(inputs, targets):
            loss = self._loss(self._stage(*pick(given, self._stage.names)), wanted).mean() / self._num_micro_batches
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
        self._stages, self._world, self._loss = stages, world, config.recipe.loss
        self._num_micro_batches = config.micro_batches(world.dims)
        self._micro_batch_shape = (config.options.micro_batch_size, *config.latent_shape)
        self._wanted = example(config)[1]  # of one sample: what the last stage is to receive
        self._targets: list[Batch] = []  # of the micro batches, where the last stage is
        # Buffers between stages belong to a schedule, so that each has stages of its own.
        self._schedule = make_schedule(schedule, self._wrap(stages), self._num_micro_batches, self._loss_of)
        self._forward = make_schedule("gpipe", self._wrap(stages), 1, None)

    def _wrap(self, stages: Sequence[Stage]) -> list[PipelineStage]:
        world = self._world
        numbers = world.dims.stages_of(world.pipeline_rank)
        return [
            PipelineStage(stage, number, world.dims.num_stages, world.device, group=world.pipeline_group)
            for stage, number in zip(stages, numbers, strict=True)
        ]

    def _loss_of(self, velocity: Tensor, number: Tensor) -> Tensor:
        """Return the mean loss of a micro batch; torch hands on one tensor, so it is its number, on the CPU."""
        return self._loss(velocity, self._targets[int(number)]).mean()

    def train(self, batch: tuple[Batch, Batch] | None) -> Tensor:
        self._send_target(None if batch is None else batch[1])
        losses: list[Tensor] = []
        arguments = () if batch is None else pick(batch[0], self._stages[0].names)
        numbers = torch.arange(self._num_micro_batches) if self._world.projects else None
        self._schedule.step(*arguments, target=numbers, losses=losses, return_outputs=False)
        return torch.stack(losses).detach().mean() if losses else torch.zeros((), device=self._world.device)

    def _send_target(self, target: Batch | None) -> None:
        """Send the target from the first stage, where the features are, to the last, where the loss is."""
        world, last = self._world, self._world.dims.pipeline - 1
        if target is not None:
            for name in self._wanted:
                dist.send(target[name].contiguous(), group=world.pipeline_group, group_dst=last)
        elif world.projects:
            size = self._num_micro_batches * self._micro_batch_shape[0]
            received = {
                name: torch.empty(size, *one.shape[1:], dtype=one.dtype, device=world.device)
                for name, one in self._wanted.items()
            }
            for tensor in received.values():
                dist.recv(tensor, group=world.pipeline_group, group_src=0)
            self._targets = chunk(received, self._num_micro_batches)

    def velocity(self, inputs: Batch | None) -> Tensor:
        world = self._world
        output = self._forward.eval(*(() if inputs is None else pick(inputs, self._stages[0].names)))
        for stage in self._stages:
            release_weights(stage)
        velocity = output if world.projects else torch.empty(self._micro_batch_shape, device=world.device)
        assert isinstance(velocity, Tensor)
        dist.broadcast(velocity, group=world.pipeline_group, group_src=world.dims.pipeline - 1)
        return velocity


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
    """Return a schedule over the stages of this process; gradients are means over the micro batches.

    Args:
        name: as of `--pipeline-schedule`; "gpipe" with several stages runs each over all micro batches in turn.
        stages: of this process.
        num_micro_batches: M.
        loss: from the last stage's output and the target; None runs forward only.
    """
    if name == "zero-bubble":
        return ScheduleInterleavedZeroBubble([*stages], num_micro_batches, loss)
    if len(stages) == 1:
        single = ScheduleGPipe if name == "gpipe" else Schedule1F1B
        return single(stages[0], num_micro_batches, loss)
    several = ScheduleLoopedBFS if name == "gpipe" else ScheduleInterleaved1F1B
    return several([*stages], num_micro_batches, loss)

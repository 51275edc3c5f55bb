"""The transformer as stages, and what runs them: directly, or in a pipeline of processes.

B batch, C latent channels, F latent frames, H W latent grid, N tokens, L text tokens, D width, M micro batches.
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

from flashi2v_model import FlashI2VTransformer3DModel
from flashi2v_train.parallel import World
from flashi2v_train.step import Inputs, mean_loss


class Stage(nn.Module):
    """A stage's part of the transformer's forward pass; with one stage all of it.

    Args:
        transformer: with the stage's blocks only, see `keep_layers`.
        latent_shape: (C, F, H, W) of one sample.
    """

    def __init__(self, transformer: FlashI2VTransformer3DModel, latent_shape: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.transformer = transformer
        self.grid = transformer.token_grid((1, *latent_shape))
        self.embeds = hasattr(transformer, "patch_embedding")
        self.projects = hasattr(transformer, "proj_out")

    def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Take the tensors of `Inputs`, or what the stage before returns; return that for the next, or the velocity.

        Between stages go tokens (B, N, D), text (B, L, D), time (B, D) and its modulation (B, 6, D), all of them with
        gradients.
        """
        x, text, time, modulation = self.transformer.embed(*tensors) if self.embeds else tensors
        x = self.transformer.run_blocks(x, text, modulation, self.grid)
        if self.projects:
            return self.transformer.project(x, time, self.grid)  # (B, C, F, H, W)
        return tuple(tensor.contiguous() for tensor in (x, text, time, modulation))  # as they are to be sent


def keep_layers(
    whole: FlashI2VTransformer3DModel, layers: range, *, embeds: bool, projects: bool
) -> FlashI2VTransformer3DModel:
    """Return a transformer that holds a stage's part of another one; parameters keep their names.

    Args:
        whole: its modules are shared, not copied.
        layers: numbers of the blocks that the stage has.
        embeds: it has the embeddings and the latent shift, too.
        projects: it has the head, too.
    """
    with torch.device("meta"):
        part = type(whole).from_config(whole.config)
    part.blocks = nn.ModuleDict({str(number): whole.blocks[number] for number in layers})
    for name, kept in (
        ("patch_embedding", embeds),
        ("fourier_embedding", embeds),
        ("learnable_proj", embeds),
        ("condition_embedder", embeds),
        ("scale_shift_table", projects),
        ("proj_out", projects),
    ):
        delattr(part, name)
        if kept:
            setattr(part, name, getattr(whole, name))
    return part


class Engine(ABC):
    """What runs the stages of this process, together with those of the others."""

    @abstractmethod
    def train(self, batch: tuple[Inputs, Tensor] | None) -> Tensor:
        """Run forward and backward over all micro batches of an optimizer step; gradients are left to be used.

        Args:
            batch: inputs and the velocity to learn, (B, C, F, H, W), of all samples of this data parallel place, where
                the first stage is; elsewhere None.

        Returns:
            the mean loss, a number; 0 where the last stage is not.
        """

    @abstractmethod
    def velocity(self, inputs: Inputs | None) -> Tensor:
        """Run forward only, without gradients.

        Args:
            inputs: of one micro batch, where the first stage is; elsewhere None.

        Returns:
            (B, C, F, H, W) in fp32, on every process.
        """


class DirectEngine(Engine):
    """One stage, which is the whole model."""

    def __init__(self, stage: nn.Module, num_micro_batches: int) -> None:
        self._stage = stage
        self._num_micro_batches = num_micro_batches

    def train(self, batch: tuple[Inputs, Tensor] | None) -> Tensor:
        assert batch is not None
        inputs, wanted = batch
        total = wanted.new_zeros(())
        for part, velocity in zip(inputs.split(self._num_micro_batches), wanted.chunk(self._num_micro_batches)):
            loss = mean_loss(self._stage(*part.tensors()), velocity) / self._num_micro_batches
            loss.backward()
            total += loss.detach()
        return total

    @torch.no_grad()
    def velocity(self, inputs: Inputs | None) -> Tensor:
        assert inputs is not None
        velocity: Tensor = self._stage(*inputs.tensors())
        give_back(self._stage)
        return velocity


class PipelineEngine(Engine):
    """Stages on several processes, and micro batches that pass through them in the order of a schedule.

    Args:
        stages: those of this process, in order; each perhaps sharded.
        world: this process among all.
        num_micro_batches: M, per optimizer step.
        micro_batch_shape: (B, C, F, H, W) of a micro batch's latents.
        schedule: as of `--pipeline-schedule`.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        world: World,
        num_micro_batches: int,
        micro_batch_shape: tuple[int, int, int, int, int],
        schedule: str,
    ) -> None:
        self._world = world
        self._batch, *latent = micro_batch_shape
        self._latent = tuple(latent)
        self._num_micro_batches = num_micro_batches
        self._stages = stages
        # Buffers between stages belong to a schedule, so that each has stages of its own.
        self._schedule = make_schedule(schedule, self._wrap(stages), num_micro_batches, mean_loss)
        self._forward = make_schedule("gpipe", self._wrap(stages), 1, None)

    def _wrap(self, stages: Sequence[nn.Module]) -> list[PipelineStage]:
        world = self._world
        numbers = world.layout.stages_of(world.pipeline_rank)
        return [
            PipelineStage(stage, number, world.layout.num_stages, world.device, group=world.pipeline_group)
            for stage, number in zip(stages, numbers, strict=True)
        ]

    def train(self, batch: tuple[Inputs, Tensor] | None) -> Tensor:
        wanted = self._hand_on_target(None if batch is None else batch[1])
        losses: list[Tensor] = []
        arguments = () if batch is None else batch[0].tensors()
        self._schedule.step(*arguments, target=wanted, losses=losses, return_outputs=False)
        return torch.stack(losses).detach().mean() if losses else torch.zeros((), device=self._world.device)

    def _hand_on_target(self, wanted: Tensor | None) -> Tensor | None:
        """The first stage has the features, the last one compares."""
        world, last = self._world, self._world.layout.pipeline - 1
        if wanted is not None:
            dist.send(wanted.contiguous(), group=world.pipeline_group, group_dst=last)
            return None
        if not world.projects:
            return None
        wanted = torch.empty(self._num_micro_batches * self._batch, *self._latent, device=world.device)
        dist.recv(wanted, group=world.pipeline_group, group_src=0)
        return wanted

    def velocity(self, inputs: Inputs | None) -> Tensor:
        world = self._world
        arguments = () if inputs is None else inputs.tensors()
        output = self._forward.eval(*arguments)
        for stage in self._stages:
            give_back(stage)
        velocity = output if world.projects else torch.empty(self._batch, *self._latent, device=world.device)
        assert isinstance(velocity, Tensor)
        dist.broadcast(velocity, group=world.pipeline_group, group_src=world.layout.pipeline - 1)
        return velocity


def give_back(stage: nn.Module) -> None:
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

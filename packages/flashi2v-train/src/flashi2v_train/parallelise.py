"""A transformer spread over processes, from outside: as pipeline stages, by its matrices and tokens, in shards.

B batch, N tokens, L text tokens, D width.
"""

import logging
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from flashi2v_model import FlashI2VTransformer3DModel, load_weights
from flashi2v_model.layers import use_fused_rms_norm
from flashi2v_model.parallel import parallelise_context, parallelise_tensors
from flashi2v_model.transformer import EMBED_INPUTS
from flashi2v_model.weights.key_names import NEW_LAYERS
from flashi2v_train.config import RunConfig
from flashi2v_train.lora import Adapters, check_start
from flashi2v_train.optim import freeze
from flashi2v_train.options import ParallelOptions
from flashi2v_train.recipe import example
from flashi2v_train.recompute import save_memory
from flashi2v_train.world import World

logger = logging.getLogger(__name__)

# What the last pipeline stage has beside its blocks; the first has all the rest.
_HEAD = ("scale_shift_table", "modulation", "proj_out")


class Stage(nn.Module):
    """A stage's part of the transformer's forward pass; with one stage all of it.

    Args:
        transformer: with the stage's blocks only, see `keep_layers`.
        latent_shape: (C, F, H, W) of one sample.
        names: of the tensors that the first stage is given.

    Attributes:
        grid: (F, H, W) of the tokens that it is given next; where it embeds, it sees that by itself.
    """

    def __init__(
        self,
        transformer: FlashI2VTransformer3DModel,
        latent_shape: tuple[int, int, int, int],
        names: Sequence[str] = EMBED_INPUTS,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.names = tuple(names)
        self.grid = transformer.token_grid((1, *latent_shape))
        self.embeds = hasattr(transformer, "patch_embedding")
        self.projects = hasattr(transformer, "proj_out")

    def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Take the recipe's inputs, or what the stage before returns; return that for the next, or the velocity.

        Between stages go tokens (B, N, D), text (B, L, D), time (B, D) and its modulation (B, 6, D), all of them with
        gradients.
        """
        x, text, time, modulation = self._embed(*tensors) if self.embeds else tensors
        x = self.transformer.run_blocks(x, text, modulation, self.grid)
        if self.projects:
            return self.transformer.project(x, time, self.grid)  # (B, C, F, H, W)
        return tuple(tensor.contiguous() for tensor in (x, text, time, modulation))  # as they are to be sent

    def _embed(self, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        named = dict(zip(self.names, tensors, strict=True))
        usual = [named.pop(name) for name in EMBED_INPUTS]
        y, timestep, states, *_ = usual
        self.grid = self.transformer.token_grid(y.shape)
        x, text, time, modulation = self.transformer.embed(*usual, **named)
        if y.shape[2] == 1:
            # An image would be its own condition: the trunk learns from it alone. What stands for the condition is
            # left out by a factor of zero, so that all processes reduce gradients of the same parameters.
            x = self.transformer.tokens(y, timestep, states)[0] + 0 * x
        return x, text, time, modulation


def keep_layers(
    whole: FlashI2VTransformer3DModel, layers: range, *, embeds: bool, projects: bool
) -> FlashI2VTransformer3DModel:
    """Return a transformer of the same class that holds a stage's part of another; parameters keep their names.

    Args:
        whole: its modules are shared, not copied.
        layers: numbers of the blocks that the stage has.
        embeds: it has all that comes before the blocks, too.
        projects: it has the head, too.
    """
    with torch.device("meta"):
        part = type(whole).from_config(whole.config)
    for name in [*part._modules, *part._parameters, *part._buffers]:
        delattr(part, name)
    for name in [*whole._modules, *whole._parameters, *whole._buffers]:
        if name == "blocks":
            part.blocks = nn.ModuleDict({str(number): whole.blocks[number] for number in layers})
        elif projects if name in _HEAD else embeds:
            setattr(part, name, getattr(whole, name))
    return part


def build_stages(config: RunConfig, world: World, *, weights: bool, adapters: Adapters | None) -> list[Stage]:
    """Build what this process holds of the transformer: whole, or its pipeline stages; shared out as configured.

    Args:
        config: of the run.
        world: this process among all.
        weights: load those that `predictor.from_pretrained` names; not needed where a checkpoint is loaded next that
            holds all of them.
        adapters: from `plan_adapters`.

    Raises:
        InputError: the weights do not fit the transformer.
    """
    predictor, options, dims = config.model.predictor, config.options, world.dims
    torch.manual_seed(options.seed)  # all processes start from the same weights
    whole = config.recipe.build(predictor)
    if options.start == "still":
        whole.start_still()
    use_fused_rms_norm(whole, predictor.use_fused_rmsnorm)
    if weights or adapters is not None:
        started = _start(whole, predictor.from_pretrained, options.start)
    if adapters is None:
        freeze(whole, options.freeze)
    else:
        check_start(str(predictor.from_pretrained), started, adapters)
        adapters.apply(whole)
    whole.train()
    names = tuple(example(config)[0])
    stages = []
    for number in dims.stages_of(world.pipeline_rank):
        part = whole
        if dims.num_stages > 1:
            first, last = number == 0, number == dims.num_stages - 1
            part = keep_layers(whole, dims.layers_of(number), embeds=first, projects=last)
        parallelise(part, world)
        save_memory(part, options, offload_attention=predictor.attention_async_offload, device=world.device)
        stage = Stage(part, config.latent_shape, names)
        shard(stage, part, world, options, bf16=config.bf16)
        stages.append(stage)
    return stages


def _start(transformer: FlashI2VTransformer3DModel, path: str | None, values: str) -> list[str]:
    """Load the weights to start from, or say which start values there are; return the parameters that they lack."""
    if path is None:
        logger.info("predictor.from_pretrained is not set: the transformer has %s start values", values)
        return []
    started = load_weights(transformer, path, new_layers_may_start=True)
    own = [name for name in started if not name.startswith(NEW_LAYERS)]
    if len(own) < len(started):
        logger.info("%s is a text-to-video trunk: FlashI2V's new layers start at zero", path)
    if own:
        logger.info(
            "%s lacks layers of %s, which keep their start values: %s", path, type(transformer).__name__, ", ".join(own)
        )
    return started


def parallelise(transformer: FlashI2VTransformer3DModel, world: World) -> None:
    """Share the matrices of a transformer (or of a stage's part of it), and the tokens that it works on."""
    if world.dims.tensor > 1:
        parallelise_tensors(transformer, world.weights_mesh["tensor"])
    if world.dims.context > 1:
        parallelise_context(transformer, world.context)


def shard(
    module: nn.Module, transformer: FlashI2VTransformer3DModel, world: World, options: ParallelOptions, *, bf16: bool
) -> None:
    """Shard parameters, gradients and optimizer state over the processes that share them (FSDP2), block by block.

    In bf16, parameters are gathered in bf16 and gradients reduced in fp32; the sharded master weights stay fp32.
    Where there is nothing to share, nothing to offload and no second dtype, the module is left as it is.

    Args:
        module: the whole computation of this process.
        transformer: what it holds of the transformer.
        world: this process among all.
        options: of the command line.
        bf16: compute in bf16.
    """
    mesh = world.weights_mesh["replica", "weights"]
    if mesh.size() == 1 and not bf16 and not options.fsdp_cpu_offload:
        module.to(world.device)
        return
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None,
        reduce_dtype=torch.float32,
        # The model casts where it must: timesteps, noise and the loss stay in fp32.
        cast_forward_inputs=False,
    )
    pins = torch.accelerator.is_available()
    offload = CPUOffloadPolicy(pin_memory=pins) if options.fsdp_cpu_offload else OffloadPolicy()
    apply = partial(fully_shard, mesh=mesh, reshard_after_forward=options.reshards, offload_policy=offload)
    if bf16 and world.device.type == "cpu" and hasattr(transformer, "learnable_proj"):
        # oneDNN's bf16 gradient of a 3x3x3 convolution over two frames is wrong, often not finite (torch 2.13).
        apply(transformer.learnable_proj, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    for block in transformer.blocks.children():
        apply(block, mp_policy=policy)
    apply(module, mp_policy=policy)

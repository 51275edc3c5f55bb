"""What a stage's forward pass keeps for the backward pass, counted on the meta device: shapes only, no numbers."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from flashi2v_model.layers import Attention
from flashi2v_train.config import RunConfig
from flashi2v_train.optim import freeze
from flashi2v_train.parallel_dims import ParallelDims
from flashi2v_train.parallelise import Stage, keep_layers
from flashi2v_train.recipe import example
from flashi2v_train.recompute import save_memory

_META = torch.device("meta")


def build_stage(config: RunConfig, dims: ParallelDims, number: int) -> Stage:
    """Build a pipeline stage on the meta device.

    Raises:
        InputError: `--freeze` names no parameter.
    """
    with _META:
        part = config.recipe.build(config.model.predictor)
    freeze(part, config.options.freeze)
    if dims.num_stages > 1:
        part = keep_layers(part, dims.layers_of(number), embeds=number == 0, projects=number == dims.num_stages - 1)
    return Stage(part.train(), config.latent_shape, tuple(example(config)[0]))


def kept_bytes(stage: Stage, config: RunConfig) -> int:
    """Return the bytes that autograd keeps of one micro batch, weights apart; the stage is changed by it."""
    transformer, options = stage.transformer, config.options
    for module in transformer.modules():
        if isinstance(module, Attention):
            module.attend = _Attention.apply
    without = options.model_copy(update={"compile": False})
    save_memory(transformer, without, offload_attention=False, device=_META)
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    transformer.to(dtype)
    seen: dict[int, Tensor] = {}  # storages stay alive while they are told apart

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            seen.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    own = {parameter.untyped_storage()._cdata for parameter in transformer.parameters()}
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        stage(*_inputs(stage, config, dtype))
    return sum(tensor.untyped_storage().nbytes() for key, tensor in seen.items() if key not in own)


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


class _Attention(torch.autograd.Function):
    """Keeps what flash attention keeps: inputs, output, and one sum per query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        sums = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)

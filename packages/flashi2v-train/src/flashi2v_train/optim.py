"""Optimizer and learning rate."""

import fnmatch
import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from flashi2v_data.errors import InputError
from flashi2v_train.options import OptimizerOptions, TrainOptions


def freeze(transformer: nn.Module, patterns: Sequence[str]) -> None:
    """Exclude parameters from training, by glob patterns of their names.

    Raises:
        InputError: a pattern fits no parameter, or nothing is left to train.
    """
    for pattern in patterns:
        names = fnmatch.filter((name for name, _ in transformer.named_parameters()), pattern)
        if not names:
            example = max((name for name, _ in transformer.named_parameters()), key=len)
            raise InputError(f"--freeze {pattern}: no parameter is called so; names are like {example}")
        for name in names:
            transformer.get_parameter(name).requires_grad_(False)
    if not any(parameter.requires_grad for parameter in transformer.parameters()):
        raise InputError("--freeze leaves nothing to train: narrow the patterns")


def build_optimizer(parameters: Mapping[str, nn.Parameter], options: OptimizerOptions) -> torch.optim.AdamW:
    """AdamW over all trainable parameters; `learnable_proj` has its own factor on the learning rate."""
    # One kernel can update only what is spread over the processes in one way.
    groups: dict[tuple[float, DeviceMesh | None], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            scale = options.proj_lr_scale if name.startswith("learnable_proj.") else 1.0
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            groups.setdefault((scale, mesh), []).append(parameter)
    # A pipeline's process may hold frozen layers only, and AdamW wants a parameter; this one never has a gradient.
    idle = [{"params": [nn.Parameter(torch.zeros(()))], "lr_scale": 1.0}]
    optimizer = torch.optim.AdamW(
        [{"params": group, "lr_scale": scale} for (scale, _), group in groups.items()] or idle,
        lr=options.lr,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_eps,
        weight_decay=options.weight_decay,
        # One kernel per parameter, on an NPU as well. torch_npu's NpuFusedAdamW moves all parameters into one buffer,
        # which sharded ones do not survive, and refuses bf16.
        fused=True,
    )
    for group in groups.values():
        for parameter in group:
            # AdamW would make its state at the first step; loading a checkpoint needs a place to write to before.
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return optimizer


def learning_rate(step: int, options: TrainOptions) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0.

    With linear and cosine decay the first step after the warm-up has the full rate; the last step of any decay, and all
    later ones, have the least. The other two decays are Megatron-LM's (`OptimizerParamScheduler`), with this step
    counted as done.
    """
    end, warmup = options.decay_end, options.num_warmup_steps
    if step < warmup:
        return options.lr_warmup_init + (options.lr - options.lr_warmup_init) * (step + 1) / warmup
    style = options.lr_decay_style
    if style == "constant":
        return options.lr
    if step >= end:
        return options.min_lr
    if style == "inverse-square-root":
        return max(options.min_lr, options.lr * math.sqrt(max(warmup, 1) / (step + 1)))
    if style == "WSD":
        decay = options.lr_wsd_decay_iters or end
        left = _left(options.lr_wsd_decay_style, max(0, step + 1 - (end - decay)) / decay)
    else:
        left = _left(style, (step - warmup) / max(1, end - 1 - warmup))
    return options.min_lr + (options.lr - options.min_lr) * left


def _left(style: str, share: float) -> float:
    """Return how much of the rate is left after a share of the decay: 1 at its begin, 0 at its end."""
    if style == "cosine":
        return 0.5 * (1 + math.cos(math.pi * share))
    if style == "exponential":
        return 2 * 0.5**share - 1  # as in Megatron
    return 1 - share


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of the rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]

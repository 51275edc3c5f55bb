"""Optimizer and learning rate."""

import math

import torch
from torch import nn

from flashi2v_npu_ops import fused_adamw
from flashi2v_train.config import TrainOptions


def build_optimizer(transformer: nn.Module, options: TrainOptions, device: torch.device) -> torch.optim.AdamW:
    """AdamW over all trainable parameters; `learnable_proj` has its own factor on the learning rate."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in transformer.named_parameters():
        if parameter.requires_grad:
            scale = options.proj_lr_scale if name.startswith("learnable_proj.") else 1.0
            groups.setdefault(scale, []).append(parameter)
    optimizer = fused_adamw(
        [{"params": parameters, "lr_scale": scale} for scale, parameters in groups.items()],
        lr=options.lr,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_eps,
        weight_decay=options.weight_decay,
    )
    for parameters in groups.values():
        for parameter in parameters:
            # AdamW would make its state at the first step; loading a checkpoint needs a place to write to before.
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=device if optimizer.defaults["fused"] else "cpu"),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return optimizer


def learning_rate(step: int, options: TrainOptions) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0."""
    if step < options.lr_warmup_iters:
        share = (step + 1) / options.lr_warmup_iters
        return options.lr_warmup_init + (options.lr - options.lr_warmup_init) * share
    if options.lr_decay_style == "constant":
        return options.lr
    # The first step after the warm-up has the full rate, the last one of the run the least.
    share = (step - options.lr_warmup_iters) / max(1, options.train_iters - 1 - options.lr_warmup_iters)
    left = 0.5 * (1 + math.cos(math.pi * share)) if options.lr_decay_style == "cosine" else 1 - share
    return options.min_lr + (options.lr - options.min_lr) * left


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of the rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]

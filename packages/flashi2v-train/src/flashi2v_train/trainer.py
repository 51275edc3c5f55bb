"""The training loop."""

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashi2v_data.atomic import atomic_file
from flashi2v_data.errors import InputError
from flashi2v_data.loader import Batch, build_dataloader
from flashi2v_model import FlashI2VTransformer3DModel, load_weights
from flashi2v_model.checkpoint import LATEST, newest_checkpoint
from flashi2v_model.libraries import quieten
from flashi2v_npu_ops import set_backend
from flashi2v_npu_ops.device import peak_memory, synchronize
from flashi2v_train import checkpoint
from flashi2v_train.clip import AdaptiveClip, PlainClip
from flashi2v_train.config import RunConfig
from flashi2v_train.ema import EMA
from flashi2v_train.encode import Encoders
from flashi2v_train.metrics import Metrics, MetricsLog
from flashi2v_train.optim import build_optimizer, learning_rate, set_learning_rate
from flashi2v_train.parallel import World, join_world, shard
from flashi2v_train.step import FlowMatchingLoss, draw

logger = logging.getLogger(__name__)

# One bad batch is skipped; a run whose gradients stay non-finite has diverged.
MAX_SKIPPED_STEPS = 10


class Trainer:
    """A run in this process: model, data, optimizer, and what is on disk.

    Args:
        config: everything that decides what the run computes.
        world: this process among all of the run.

    Raises:
        InputError: weights, data or checkpoint do not fit the configuration.
    """

    def __init__(self, config: RunConfig, world: World) -> None:
        options = config.options
        self.config, self.options, self.world = config, options, world
        self.accumulation = config.accumulation(world.size)
        set_backend("rms_norm", "auto" if config.model.predictor.use_fused_rmsnorm else "reference")
        self.loader = build_dataloader(
            config.data,
            seed=options.seed,
            batch_size=options.micro_batch_size,
            rank=world.rank,
            num_replicas=world.size,
            device=world.device,
        )
        self.encode = Encoders(config, world.device)
        self.transformer = self._build_transformer().to(world.device)
        self.loss = shard(FlowMatchingLoss(self.transformer), world, bf16=config.bf16)
        self.optimizer = build_optimizer(self.transformer, options, world.device)
        self.ema = EMA(self.transformer.named_parameters(), options.ema_decay) if options.use_ema else None
        self.clip = (
            PlainClip(options.clip_grad)
            if options.clip_grad_ema_decay is None
            else AdaptiveClip(options.clip_grad, options.clip_grad_ema_decay)
        )
        self.step = 0
        self.skipped_steps = 0
        self.skipped_videos = self.skipped_videos_before = 0
        self._resume()

    def _build_transformer(self) -> FlashI2VTransformer3DModel:
        """All processes start from the same weights."""
        predictor = self.config.model.predictor
        torch.manual_seed(self.options.seed)
        transformer = FlashI2VTransformer3DModel(**predictor.transformer_arguments())
        if predictor.from_pretrained is None:
            logger.info("predictor.from_pretrained is not set: the transformer starts from random weights")
        elif load_weights(transformer, predictor.from_pretrained, new_layers_may_start=True):
            logger.info("%s is a text-to-video trunk: FlashI2V's new layers start at zero", predictor.from_pretrained)
        return transformer.train()

    def _resume(self) -> None:
        directory = newest_checkpoint(self.options.save)
        if directory is None and self.options.load is not None:
            directory = newest_checkpoint(self.options.load)
            if directory is None:
                raise InputError(f"--load {self.options.load}: holds no checkpoint ({LATEST} is not there)")
        if directory is None:
            return
        progress = checkpoint.load(directory, self.transformer, self.optimizer, self.ema)
        self.step = progress["iteration"]
        self.skipped_videos_before = progress["skipped_videos"]
        self.loader.load_state_dict(progress["loader"])
        self.clip.load_state_dict(progress["clip"])
        logger.info("resumed from %s", directory)

    def run(self) -> None:
        """Train to the last step, saving on the way."""
        options = self.options
        log = None
        if self.world.is_first:
            options.save.mkdir(parents=True, exist_ok=True)
            with atomic_file(options.save / "config.json") as path:
                path.write_text(json.dumps(self.config.as_dict(), indent=1) + "\n")
            log = MetricsLog(options.save, self.step, options.train_iters)
        batches = iter(self.loader)
        try:
            while self.step < options.train_iters:
                started = time.perf_counter()
                metrics = self._train_step([next(batches) for _ in range(self.accumulation)])
                self.step += 1
                synchronize(self.world.device)
                seconds = time.perf_counter() - started
                metrics |= {
                    "step": self.step,
                    "seconds": seconds,
                    "samples_per_second": self._samples_per_step() / seconds,
                    "skipped_videos": self.skipped_videos,
                    "peak_memory_bytes": peak_memory(self.world.device),
                }
                if log is not None:
                    if self.step % options.log_interval == 0:
                        log.write(metrics)
                    log.advance(metrics)
                if self.step % options.save_interval == 0 or self.step == options.train_iters:
                    self._save()
        finally:
            if log is not None:
                log.close()

    def _samples_per_step(self) -> int:
        return self.options.micro_batch_size * self.world.size * self.accumulation

    def _train_step(self, batches: list[Batch]) -> Metrics:
        rate = learning_rate(self.step, self.options)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.world.device)
        for batch in batches:
            share = self._losses(batch).mean() / len(batches)
            share.backward()
            loss += share.detach()
        gradients = [p.grad for p in self.transformer.parameters() if p.grad is not None]
        norm = _full(torch.nn.utils.get_total_norm(gradients)).item()
        if math.isfinite(norm):
            self.skipped_steps = 0
            factor = self.clip.factor(norm)
            if factor != 1.0:
                torch._foreach_mul_(gradients, factor)
            self.optimizer.step()
            if self.ema is not None:
                self.ema.update()
        else:
            self._skip(norm)
        everyones = self.world.sum(torch.stack((loss, loss.new_tensor(len(self.loader.skipped)))))
        self.skipped_videos = self.skipped_videos_before + int(everyones[1].item())
        return {"loss": everyones[0].item() / self.world.size, "grad_norm": norm, "lr": rate}

    def _losses(self, batch: Batch) -> Tensor:
        keys = list(zip(batch["epoch"].tolist(), batch["index"].tolist()))
        draws = draw(self.config, keys)
        features = self.encode(batch, draws)
        losses: Tensor = self.loss(
            features.latents, features.condition, features.context, draws.noise, draws.sigma, draws.ratio
        )
        return losses

    def _skip(self, norm: float) -> None:
        self.skipped_steps += 1
        logger.warning("step %d: the gradient's norm is %s, step skipped", self.step + 1, norm)
        if self.skipped_steps >= MAX_SKIPPED_STEPS:
            raise RuntimeError(
                f"{MAX_SKIPPED_STEPS} steps in a row had a non-finite gradient: lower --lr, or look at the data; "
                f"the last checkpoint in {self.options.save} is whole"
            )

    def _save(self) -> None:
        progress: dict[str, Any] = {
            "iteration": self.step,
            "loader": self.loader.state_dict(),
            "clip": self.clip.state_dict(),
            "skipped_videos": self.skipped_videos,
        }
        checkpoint.save(self.options.save, self.step, self.transformer, self.optimizer, self.ema, progress, self.world)


def _full(value: Tensor) -> Tensor:
    """A norm over sharded gradients is itself spread over the processes."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def train(config: RunConfig) -> Path:
    """Run a training in this process (one of those that torchrun started, or the only one); return its directory.

    Raises:
        InputError: weights, data or checkpoint do not fit the configuration.
    """
    quieten()
    with join_world(config.options.device) as world:
        Trainer(config, world).run()
    return config.options.save

"""The training loop: a batch is read, drawn for, passed forward and backward, and the weights are moved."""

import json
import logging
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashi2v_data.errors import InputError
from flashi2v_model.weights.libraries import quieten
from flashi2v_npu_ops.device import synchronize
from flashi2v_npu_ops.faults import device_faults_told
from flashi2v_train.autopsy import Skips
from flashi2v_train.batch import Batch, Series
from flashi2v_train.checkpoint import PROGRESS, Checkpoints, find_checkpoint, load, run_state
from flashi2v_train.clip import AdaptiveClip, PlainClip, scale_gradients, share_of_square
from flashi2v_train.config import RunConfig
from flashi2v_train.ema import EMA
from flashi2v_train.engines import build_engine
from flashi2v_train.features import FeatureSource, Origin
from flashi2v_train.lora import checkpoint_facts, plan_adapters, trained_parameters
from flashi2v_train.metrics import Meter, Metrics, MetricsLog, disk_failures_reported, open_log
from flashi2v_train.optim import build_optimizer, learning_rate, set_learning_rate
from flashi2v_train.parallelise import build_stages
from flashi2v_train.processes import StopSignal, hold_directory, is_restarted
from flashi2v_train.provenance import provenance_of_features
from flashi2v_train.recipe import draw_series
from flashi2v_train.validation import Validation, build_validation
from flashi2v_train.watchdog import Watchdog
from flashi2v_train.world import World, join_world, rank_and_size

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """What all processes together found in a step.

    Attributes:
        loss: mean over the global batch.
        norm: of the whole gradient.
        stops: some process was asked to stop.
        skipped_videos: unreadable ones met since this start.
        wait_seconds: mean time that a process waited for data.
    """

    loss: float
    norm: float
    stops: bool
    skipped_videos: int
    wait_seconds: float

    @property
    def is_finite(self) -> bool:
        """Whether the step can be taken."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


class Trainer:
    """A run in this process: model, data, optimizer, and what is on disk.

    `train_step` is the whole of a step; `forward_backward` and `update` are its two halves.

    Args:
        config: everything that decides what the run computes.
        world: this process among all of the run.

    Raises:
        InputError: weights, data or checkpoint do not fit the configuration.
    """

    def __init__(self, config: RunConfig, world: World) -> None:
        options = config.options
        self.config, self.options, self.world, self.recipe = config, options, world, config.recipe
        provenance = provenance_of_features(config, world)
        self.source = FeatureSource(config, world, provenance) if world.embeds else None
        iteration = None if is_restarted() else options.load_iteration
        resumed = find_checkpoint(options.save, options.load, iteration, world)
        adapters = plan_adapters(config)
        self.stages = build_stages(config, world, weights=resumed is None, adapters=adapters)
        self.parameters = trained_parameters(self.stages, options)
        self.engine = build_engine(config, world, self.stages)
        self.validation = self._build_validation()
        self.optimizer = build_optimizer(self.parameters, options)
        self.ema = EMA(self.parameters.items(), options.ema_decay) if options.use_ema else None
        self.clip = (
            PlainClip(options.clip_grad)
            if options.clip_grad_ema_decay is None
            else AdaptiveClip(options.clip_grad, options.clip_grad_ema_decay)
        )
        built = json.loads(self.stages[0].transformer.to_json_string())
        self.transformer_config = built | checkpoint_facts(config, adapters)
        self.state = self._state(optimizer=options.save_optim)
        self.step = 0
        self.waited = 0.0  # for data, in this step
        self.counts: Sequence[int] = ()  # samples of this step by bucket, where they are read
        self.skipped_videos_before = 0
        self.skips = Skips(options.save, options.max_skipped_steps, world.rank, keeps=world.peers.rank() == 0)
        self.meter = Meter(config, world)
        self.watchdog = Watchdog(world.rank, world.size, world.control, 60 * options.distributed_timeout_minutes)
        self.checkpoints = Checkpoints(
            options.save,
            world,
            keep=options.keep_checkpoints,
            asynchronous=options.async_save,
            start=resumed if resumed is not None and resumed.parent == options.save else None,
            on_wait=lambda: self.watchdog.beat(self.step, "saving"),  # a slow disk does move
        )
        if resumed is not None:
            with self.watchdog:  # a disk may hang
                self._resume(resumed)

    def _build_validation(self) -> Validation | None:
        if self.options.eval_interval is None:
            return None

        def velocity(inputs: Batch | None) -> Tensor:
            self.watchdog.beat(self.step, "validating")  # a long validation does move
            return self.engine.velocity(inputs)

        encoders = None if self.source is None else self.source.encoders
        return build_validation(self.config, self.world, velocity, encoders)

    def _resume(self, directory: Path) -> None:
        progress = load(directory, self._state(optimizer=self.options.load_optim), self.transformer_config, self.world)
        try:
            self.step = int(progress["iteration"])
            self.skips.total = progress.get("skipped_steps", 0)
            self.skips.in_a_row = progress.get("skipped_in_a_row", 0)
            self.skipped_videos_before = progress["skipped_videos"]
            if self.source is not None:
                self.source.load_state_dict(progress["loader"])
            self.clip.load_state_dict(progress["clip"])
        except (LookupError, TypeError) as error:
            raise InputError(f"{directory / PROGRESS} is not what a run has written: {error!r}") from error
        logger.info("resumed from %s", directory)

    def _state(self, *, optimizer: bool) -> dict[str, Tensor]:
        return run_state(self.parameters.items(), self.optimizer if optimizer else None, self.ema)

    def run(self, stop: StopSignal, started: float | None = None) -> None:
        """Train to the last step, or until the processes are asked to stop; save on the way.

        Args:
            stop: that was asked for.
            started: when this start of the run began, by `time.monotonic`; default: now.

        Raises:
            RunError: the run has diverged.
            StorageError: a checkpoint could not be written.
        """
        options, world = self.options, self.world
        with ExitStack() as stack:
            stack.enter_context(disk_failures_reported())
            log = stack.enter_context(open_log(self.config, self.step, started)) if world.is_first else None
            if self.source is not None:
                stack.callback(self.source.close)
            stack.enter_context(self.checkpoints)
            stack.enter_context(self.watchdog)
            if self.step == 0:
                self._validate(log)
            stops = False
            while self.step < options.train_iters and not stops:
                began = time.perf_counter()
                verdict, metrics = self.train_step(stop)
                self.step += 1
                synchronize(world.device)
                metrics |= self.meter.measure(time.perf_counter() - began, verdict.wait_seconds, self.counts)
                metrics |= {"skipped_videos": verdict.skipped_videos, "skipped_steps": self.skips.total}
                stops = verdict.stops
                if log is not None:
                    log.write(metrics)
                self.checkpoints.poll()
                if stops or self.step == options.train_iters or self.step % options.save_interval == 0:
                    self._save(verdict)
                is_due = self.step == options.train_iters or self.step % (options.eval_interval or 1) == 0
                if is_due and not stops:
                    self._validate(log)
            self.watchdog.beat(self.step, "saving")
            self.checkpoints.wait()
            if log is not None:
                facts = self.meter.facts() | {"seconds_stalled_by_checkpoints": self.checkpoints.stalled_seconds}
                log.finish("stopped by SIGTERM or SIGUSR1" if stops else "done", facts)

    def train_step(self, stop: StopSignal) -> tuple[Verdict, Metrics]:
        """Take the next optimizer step, unless its loss or gradient is not finite."""
        rate = learning_rate(self.step, self.options)
        set_learning_rate(self.optimizer, rate)
        self.watchdog.beat(self.step + 1, "reading and encoding")
        series, origins = self.next_batch()
        self.watchdog.beat(self.step + 1, "forward and backward")
        loss = self.forward_backward(series)
        self.watchdog.beat(self.step + 1, "exchanging gradients")
        verdict = self._agree(loss, stops=stop.received)
        if verdict.is_finite:
            self.skips.in_a_row = 0
            self.update(verdict.norm)
        else:
            self.skips.add(self.step + 1, verdict.loss, verdict.norm, series, origins)
        return verdict, {"step": self.step + 1, "loss": verdict.loss, "grad_norm": verdict.norm, "lr": rate}

    def next_batch(self) -> tuple[Series | None, list[Origin]]:
        """Return the micro batches of a step with all that is drawn for them; None where the first stage is not."""
        if self.source is None:
            return None, []
        before = self.source.wait_seconds
        series, origins = next(self.source)
        self.waited, self.counts = self.source.wait_seconds - before, series.counts
        return draw_series(self.config, series, [origin.key for origin in origins], self.world.device), origins

    def forward_backward(self, series: Series | None) -> Tensor:
        """Leave the gradients of a step; return its mean loss, a number, 0 where the last stage is not."""
        self.optimizer.zero_grad(set_to_none=True)
        return self.engine.train(series)

    def update(self, norm: float) -> None:
        """Move weights and average by the gradients, clipped by their norm over all processes."""
        factor = self.clip.factor(norm)
        if factor != 1.0:
            scale_gradients(self.parameters.values(), factor)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update()

    def _agree(self, loss: Tensor, *, stops: bool) -> Verdict:
        """Exchange the few numbers that decide how a step ends, in one go."""
        world = self.world
        holders = world.size // world.dims.pipeline
        share = share_of_square(self.parameters.values(), holders, world.device)
        skipped = 0 if self.source is None else self.source.num_skipped
        own = torch.tensor([stops, skipped, self.waited], dtype=torch.float32, device=world.device)
        square, total, stopping, skipped_videos, wait = world.sum(
            torch.cat((share[None], loss.float()[None], own))
        ).tolist()
        return Verdict(
            total / holders,
            math.sqrt(square),
            stopping > 0,
            self.skipped_videos_before + int(skipped_videos),
            wait / holders,
        )

    def _validate(self, log: MetricsLog | None) -> None:
        if self.validation is None:
            return
        with nullcontext() if self.ema is None or not self.options.eval_ema else self.ema.in_place():
            metrics = self.validation(self.step)
        if log is not None:
            log.write_validation(self.step, metrics)

    def _save(self, verdict: Verdict) -> None:
        self.watchdog.beat(self.step, "saving")
        progress: dict[str, Any] = {
            "iteration": self.step,
            # Only the first process's progress is written, and the first pipeline stage is there.
            "loader": None if self.source is None else self.source.state_dict(),
            "clip": self.clip.state_dict(),
            "skipped_steps": self.skips.total,
            "skipped_in_a_row": self.skips.in_a_row,
            "skipped_videos": verdict.skipped_videos,
        }
        self.checkpoints.save(self.step, self.state, progress, self.transformer_config)


@device_faults_told("--recompute-granularity, more processes (--suggest-split), or smaller clips")
def train(config: RunConfig, started: float | None = None) -> Path:
    """Run a training in this process (one of those that torchrun started, or the only one); return its directory.

    Args:
        config: of the run.
        started: when it began, by `time.monotonic`; default: now.

    Raises:
        InputError: weights, data or checkpoint do not fit the configuration.
    """
    quieten()
    # The watchdog names who is late; only if it cannot, the collectives give up.
    timeout = timedelta(minutes=2 * config.options.distributed_timeout_minutes)
    dims = config.parallel_dims(rank_and_size()[1])
    with ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        world = stack.enter_context(join_world(config.options.device, dims, timeout))
        stack.enter_context(hold_directory(config.options.save, "--save", world.control))
        Trainer(config, world).run(stop, started)
    return config.options.save

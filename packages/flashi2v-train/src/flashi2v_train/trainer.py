"""The training loop."""

import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashi2v_data.atomic import atomic_file
from flashi2v_data.console import machine_fault
from flashi2v_data.errors import InputError, StorageError
from flashi2v_model import FlashI2VTransformer3DModel, load_weights
from flashi2v_model.layers import use_fused_rms_norm
from flashi2v_model.weights.checkpoint import LATEST, checkpoints_of, is_checkpoint, newest_checkpoint
from flashi2v_model.weights.libraries import quieten
from flashi2v_npu_ops.device import name as device_name
from flashi2v_npu_ops.device import peak_memory, synchronize
from flashi2v_train.autopsy import save_autopsy
from flashi2v_train.checkpoint import PROGRESS, Checkpoints, load, run_state
from flashi2v_train.clip import AdaptiveClip, PlainClip, scale_gradients, share_of_square
from flashi2v_train.config import RunConfig, read_eval_data
from flashi2v_train.cost import count_operations, count_parameters, num_tokens, peak_flops
from flashi2v_train.ema import EMA
from flashi2v_train.encode import check_store, made_by
from flashi2v_train.features import Encoders, FeatureSource, StepSamples
from flashi2v_train.metrics import Metrics, MetricsLog
from flashi2v_train.optim import build_optimizer, freeze, learning_rate, set_learning_rate
from flashi2v_train.parallel import World, join_world, parallelise, rank_and_size, shard
from flashi2v_train.pipeline import DirectEngine, Engine, PipelineEngine, Stage, keep_layers
from flashi2v_train.processes import RunError, StopSignal, hold_directory, is_restarted
from flashi2v_train.recompute import save_memory
from flashi2v_train.step import Inputs, draw, make_inputs
from flashi2v_train.validation import Validation
from flashi2v_train.watchdog import Watchdog

logger = logging.getLogger(__name__)


def build_stages(config: RunConfig, world: World, *, weights: bool) -> list[Stage]:
    """Build what this process holds of the transformer: whole, or its pipeline stages; shared out as the layout says.

    Args:
        config: of the run.
        world: this process among all.
        weights: load those that `predictor.from_pretrained` names; not needed where a checkpoint is loaded next.

    Raises:
        InputError: the weights do not fit the transformer.
    """
    predictor, options, layout = config.model.predictor, config.options, world.layout
    torch.manual_seed(options.seed)  # all processes start from the same weights
    whole = FlashI2VTransformer3DModel(**predictor.transformer_arguments())
    use_fused_rms_norm(whole, predictor.use_fused_rmsnorm)
    if weights:
        _start(whole, predictor.from_pretrained)
    freeze(whole.train(), options.freeze)
    stages = []
    for number in layout.stages_of(world.pipeline_rank):
        part = whole
        if layout.num_stages > 1:
            first, last = number == 0, number == layout.num_stages - 1
            part = keep_layers(whole, layout.layers_of(number), embeds=first, projects=last)
        parallelise(part, world)
        save_memory(part, options, offload_attention=predictor.attention_async_offload, device=world.device)
        stage = Stage(part, config.latent_shape)
        shard(stage, part, world, options, bf16=config.bf16)
        stages.append(stage)
    return stages


def _start(transformer: FlashI2VTransformer3DModel, path: str | None) -> None:
    if path is None:
        logger.info("predictor.from_pretrained is not set: the transformer starts from random weights")
    elif load_weights(transformer, path, new_layers_may_start=True):
        logger.info("%s is a text-to-video trunk: FlashI2V's new layers start at zero", path)


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

    Args:
        config: everything that decides what the run computes.
        world: this process among all of the run.

    Raises:
        InputError: weights, data or checkpoint do not fit the configuration.
    """

    def __init__(self, config: RunConfig, world: World) -> None:
        options, layout = config.options, world.layout
        self.config, self.options, self.world = config, options, world
        self.num_micro_batches = config.micro_batches(layout)
        samples = self.num_micro_batches * options.micro_batch_size
        origin = self._origin_of_features(config)
        self.source = FeatureSource(config, world, samples, origin) if world.embeds else None
        found = [self._find_checkpoint() if world.is_first else None]  # a shared disk may show others an older one yet
        dist.broadcast_object_list(found, 0, world.control)
        resumed = found[0]
        self.stages = build_stages(config, world, weights=resumed is None)
        self.parameters = {
            name: parameter for stage in self.stages for name, parameter in stage.transformer.named_parameters()
        }
        self.engine = self._build_engine()
        self.validation = self._build_validation()
        self.optimizer = build_optimizer(self.parameters, options)
        self.ema = EMA(self.parameters.items(), options.ema_decay) if options.use_ema else None
        self.clip = (
            PlainClip(options.clip_grad)
            if options.clip_grad_ema_decay is None
            else AdaptiveClip(options.clip_grad, options.clip_grad_ema_decay)
        )
        self.flops_per_sample = count_operations(config.model.predictor, config.latent_shape).training
        self.transformer_config = dict(json.loads(self.stages[0].transformer.to_json_string()))
        self.state = self._state(optimizer=options.save_optim)
        self.checkpoints = Checkpoints(
            options.save,
            world,
            keep=options.keep_checkpoints,
            asynchronous=options.async_save,
            start=resumed if resumed is not None and resumed.parent == options.save else None,
            on_wait=self._wait_for_disk,
        )
        self.watchdog: Watchdog | None = None
        self.step = 0
        self.skipped_in_a_row = 0
        self.skipped_steps = self.skipped_videos_before = 0
        if resumed is not None:
            self._resume(resumed)

    def _origin_of_features(self, config: RunConfig) -> dict[str, Any] | None:
        """Return what features must have been made by, where any are loaded; called by all processes."""
        data = config.data.dataset_param
        if not (data.load_video_features or data.load_text_features):
            return None
        origin: list[dict[str, Any] | None] = [None]
        if self.world.is_first:  # it takes a while to read all weights
            check_store(str(data.features_path))
            origin = [made_by(config, video=data.load_video_features, text=data.load_text_features)]
        dist.broadcast_object_list(origin, 0, self.world.control)
        return origin[0]

    def _build_validation(self) -> Validation | None:
        if self.options.eval_interval is None:
            return None
        data = read_eval_data(self.options, self.config.data)
        config = replace(self.config, data=data)
        origin = self._origin_of_features(config)
        encode = decode = None
        if self.source is not None:
            same = self.options.eval_data is None
            encoders = self.source.encoders if same else Encoders(config, self.world.device)
            encode, decode = partial(encoders, sampled=False), encoders.decode
        return Validation(config, self.world, self._velocity, encode, decode, origin)

    def _velocity(self, inputs: Inputs | None) -> Tensor:
        if self.watchdog is not None:  # a long validation does move
            self.watchdog.beat(self.step, "validating")
        return self.engine.velocity(inputs)

    def _validate(self, log: MetricsLog | None) -> None:
        assert self.validation is not None
        with nullcontext() if self.ema is None or not self.options.eval_ema else self.ema.in_place():
            metrics = self.validation(self.step)
        if log is not None:
            log.write_validation(self.step, metrics)

    def _find_checkpoint(self) -> Path | None:
        options, number = self.options, self.options.load_iteration
        runs = [options.save]
        # Megatron's scripts name one directory twice; it is empty at the first start.
        if options.load is not None and options.load.resolve() != options.save.resolve():
            runs.append(options.load)
        if number is not None and not is_restarted():
            for run in runs:
                if is_checkpoint(run / f"iter_{number:07d}"):
                    return run / f"iter_{number:07d}"
            there = ", ".join(str(int(path.name[5:])) for run in runs for path in checkpoints_of(run)[:10])
            raise InputError(f"--load-iteration {number}: there is no such checkpoint, only {there or 'none'}")
        for run in runs:
            directory = newest_checkpoint(run)
            if directory is not None:
                later = checkpoints_of(run)[0]
                if later.name > directory.name:
                    logger.warning(
                        "%s is later than the one that %s names, and is not gone on from", later, run / LATEST
                    )
                return directory
        if len(runs) > 1:
            raise InputError(f"--load {options.load}: holds no checkpoint ({LATEST} is not there)")
        return None

    def _build_engine(self) -> Engine:
        layout, options = self.world.layout, self.options
        if layout.num_stages == 1:
            return DirectEngine(self.stages[0], self.num_micro_batches)
        return PipelineEngine(
            self.stages,
            self.world,
            self.num_micro_batches,
            (options.micro_batch_size, *self.config.latent_shape),
            options.pipeline_schedule or ("interleaved" if layout.num_stages > layout.pipeline else "1f1b"),
        )

    def _open_log(self) -> MetricsLog:
        config = self.config.as_dict()
        with atomic_file(self.options.save / "config.json") as path:
            path.write_text(json.dumps(config, indent=1) + "\n")
        return MetricsLog(self.options, self.step, config)

    def _measures(self, verdict: Verdict, seconds: float) -> Metrics:
        """Return what is measured of a step, beside what it computes."""
        device, layout = self.world.device, self.world.layout
        samples = self.num_micro_batches * self.options.micro_batch_size * layout.data
        metrics: Metrics = {
            "step": self.step,
            "seconds": seconds,
            "samples_per_second": samples / seconds,
            "tokens_per_second": samples * num_tokens(self.config) / seconds,
            "data_wait_share": verdict.wait_seconds / seconds,
            "skipped_videos": verdict.skipped_videos,
            "skipped_steps": self.skipped_steps,
            "peak_memory_bytes": peak_memory(device),
        }
        # What makers promise is for bf16.
        peak = peak_flops(device_name(device.type)) if device.type != "cpu" and self.config.bf16 else None
        if peak is not None:
            metrics["model_flops_utilisation"] = self.flops_per_sample * samples / seconds / peak / self.world.size
        return metrics

    def _facts(self) -> dict[str, Any]:
        """Return what the summary of the run says beside its numbers."""
        device = self.world.device.type
        return {
            "parameters": sum(count_parameters(self.config).values()),
            "layout": self.world.layout.describe(),
            "processes": self.world.size,
            "device": f"{device}, {device_name(device)}",
            "versions": {name: version(name) for name in ("flashi2v-train", "flashi2v-model", "torch")},
            "seconds_stalled_by_checkpoints": self.checkpoints.stalled_seconds,
        }

    def _wait_for_disk(self) -> None:
        if self.watchdog is not None:  # a slow disk does move
            self.watchdog.beat(self.step, "saving")

    def _resume(self, directory: Path) -> None:
        progress = load(directory, self._state(optimizer=self.options.load_optim), self.transformer_config, self.world)
        try:
            self.step = int(progress["iteration"])
            self.skipped_steps = progress.get("skipped_steps", 0)
            self.skipped_in_a_row = progress.get("skipped_in_a_row", 0)
            self.skipped_videos_before = progress["skipped_videos"]
            if self.source is not None:
                self.source.load_state_dict(progress["loader"])
            self.clip.load_state_dict(progress["clip"])
        except (LookupError, TypeError) as error:
            raise InputError(f"{directory / PROGRESS} is not what a run has written: {error!r}") from error
        logger.info("resumed from %s", directory)

    def _state(self, *, optimizer: bool) -> dict[str, Tensor]:
        return run_state(self.parameters.items(), self.optimizer if optimizer else None, self.ema)

    def run(self, stop: StopSignal) -> None:
        """Train to the last step, or until the processes are asked to stop; save on the way.

        Raises:
            RunError: the run has diverged.
            StorageError: a checkpoint could not be written.
        """
        options, world = self.options, self.world
        with ExitStack() as stack:
            stack.enter_context(_told_of_a_failing_disk())
            log = stack.enter_context(self._open_log()) if world.is_first else None
            if self.source is not None:
                stack.callback(self.source.close)
            stack.enter_context(self.checkpoints)
            watchdog = self.watchdog = stack.enter_context(
                Watchdog(world.rank, world.size, world.control, 60 * options.distributed_timeout_minutes)
            )
            stops = False
            while self.step < options.train_iters and not stops:
                started = time.perf_counter()
                verdict, metrics = self._train_step(stop, watchdog)
                self.step += 1
                synchronize(world.device)
                metrics |= self._measures(verdict, time.perf_counter() - started)
                stops = verdict.stops
                if log is not None:
                    log.write(metrics)
                self.checkpoints.poll()
                if stops or self.step == options.train_iters or self.step % options.save_interval == 0:
                    watchdog.beat(self.step, "saving")
                    self._save(verdict)
                if options.eval_interval is not None and self.step % options.eval_interval == 0 and not stops:
                    self._validate(log)
            watchdog.beat(self.step, "saving")
            self.checkpoints.wait()
            if log is not None:
                log.finish("stopped by SIGTERM or SIGUSR1" if stops else "done", self._facts())

    def _train_step(self, stop: StopSignal, watchdog: Watchdog) -> tuple[Verdict, Metrics]:
        rate = learning_rate(self.step, self.options)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.zero_grad(set_to_none=True)
        samples, batch = None, None
        if self.source is not None:
            watchdog.beat(self.step + 1, "reading and encoding")
            samples = next(self.source)
            batch = make_inputs(samples.features, draw(self.config, samples.keys))
        watchdog.beat(self.step + 1, "forward and backward")
        loss = self.engine.train(batch)
        watchdog.beat(self.step + 1, "exchanging gradients")
        verdict = self._agree(loss, samples, stops=stop.received)
        if verdict.is_finite:
            self.skipped_in_a_row = 0
            self._update(verdict)
        else:
            self._skip(verdict, samples, batch)
        return verdict, {"loss": verdict.loss, "grad_norm": verdict.norm, "lr": rate}

    def _agree(self, loss: Tensor, samples: StepSamples | None, *, stops: bool) -> Verdict:
        """Exchange the few numbers that decide how a step ends, in one go."""
        world, layout = self.world, self.world.layout
        holders = world.size // layout.pipeline
        share = share_of_square(self.parameters.values(), holders, world.device)
        skipped = 0 if self.source is None else self.source.num_skipped
        waited = 0.0 if samples is None else samples.wait_seconds
        own = torch.tensor([stops, skipped, waited], dtype=torch.float32, device=world.device)
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

    def _update(self, verdict: Verdict) -> None:
        factor = self.clip.factor(verdict.norm)
        if factor != 1.0:
            scale_gradients(self.parameters.values(), factor)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update()

    def _skip(self, verdict: Verdict, samples: StepSamples | None, batch: tuple[Inputs, Tensor] | None) -> None:
        """Leave a step out whose loss or gradient is not finite, and keep what it was computed from."""
        step, limit = self.step + 1, self.options.max_skipped_steps
        self.skipped_in_a_row += 1
        self.skipped_steps += 1
        place = None
        what = f"loss {verdict.loss}, gradient norm {verdict.norm}"
        if samples is not None and batch is not None and self.world.peers.rank() == 0:
            place = save_autopsy(
                self.options.save / "autopsy",
                step,
                batch,
                samples.keys,
                samples.paths,
                samples.captions,
                self.world.rank,
            )
        if place is not None:
            what += f"; its batch is in {place}"
        if place is not None or self.world.is_first:
            logger.warning("step %d is not finite and is skipped: %s", step, what)
        if self.skipped_in_a_row >= limit:
            raise RunError(
                f"{limit} steps in a row were not finite: lower --lr, or look at the batches in "
                f"{self.options.save / 'autopsy'}; the last checkpoint in {self.options.save} is whole"
            )

    def _save(self, verdict: Verdict) -> None:
        # Only the first process's progress is written, and the first pipeline stage is there.
        loader = None if self.source is None else self.source.state_dict()
        progress = {
            "iteration": self.step,
            "loader": loader,
            "clip": self.clip.state_dict(),
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "skipped_videos": verdict.skipped_videos,
        }
        self.checkpoints.save(self.step, self.state, progress, self.transformer_config)


@contextmanager
def _told_of_a_failing_disk() -> Iterator[None]:
    """Let what else is written than checkpoints end a run in one line, too."""
    try:
        yield
    except ConnectionError:  # another process has ended, which says why
        raise
    except OSError as error:
        raise StorageError(f"{machine_fault(error)}: mend that, and start the same command again") from error


def train(config: RunConfig) -> Path:
    """Run a training in this process (one of those that torchrun started, or the only one); return its directory.

    Raises:
        InputError: weights, data or checkpoint do not fit the configuration.
    """
    quieten()
    # The watchdog names who is late; only if it cannot, the collectives give up.
    timeout = timedelta(minutes=2 * config.options.distributed_timeout_minutes)
    layout = config.layout(rank_and_size()[1])
    with ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        world = stack.enter_context(join_world(config.options.device, layout, timeout))
        stack.enter_context(hold_directory(config.options.save, "--save", world.control))
        Trainer(config, world).run(stop)
    return config.options.save

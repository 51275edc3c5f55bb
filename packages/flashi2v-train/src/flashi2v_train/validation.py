"""Validation on the way: the loss at fixed sigmas, and sampled videos to look at.

B samples of a micro batch, C latent channels, F latent frames, H W latent grid, T video frames, L text tokens.

Samples are numbered through: number n is the n-th of the data file in its own order, on data parallel rank n % D of
D. All random draws belong to a sample, so every validation of a run, on every layout, looks at the same ones.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashi2v_data.atomic import atomic_file
from flashi2v_data.loading.loader import Batch as LoadedBatch
from flashi2v_data.loading.loader import StatefulLoader, build_dataloader
from flashi2v_data.randomness import generator
from flashi2v_data.video.measures import motion, psnr, stillness
from flashi2v_data.video.strips import film_strip
from flashi2v_data.video.write import write_video
from flashi2v_model.sampling import guided, integrate, set_timesteps
from flashi2v_model.scheduler import euler_scheduler
from flashi2v_train.batch import Batch, to
from flashi2v_train.config import RunConfig, read_eval_data
from flashi2v_train.features import Encoders
from flashi2v_train.provenance import provenance_of_features
from flashi2v_train.world import World

logger = logging.getLogger(__name__)

SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
# The cut-off's energy share at inference; the loss is measured at shares from the range of training.
_SAMPLING_RATIO = 0.1
# What is measured of sampled videos beside the real ones.
VIDEO_MEASURES = ("first_frame_psnr", "motion", "stillness", "real_motion", "real_stillness")
# Of videos whose data file counts in strides instead.
_DEFAULT_FPS = 16.0


def build_validation(
    config: RunConfig, world: World, velocity: Callable[[Batch | None], Tensor], encoders: Encoders | None
) -> "Validation":
    """Return the validation of a run; called by all processes.

    Args:
        config: of the run.
        world: this process among all.
        velocity: as of `Validation`.
        encoders: of the training's samples; None where the first stage is not.

    Raises:
        InputError: as `Validation`.
    """
    data = read_eval_data(config.options, config.data)
    validated = replace(config, data=data)
    provenance = provenance_of_features(validated, world)
    if encoders is not None and config.options.eval_data is not None:
        encoders = Encoders(validated, world.device)
    encode = None if encoders is None else partial(encoders, sampled=False)
    return Validation(validated, world, velocity, encode, None if encoders is None else encoders.decode, provenance)


class Validation:
    """Measures and shows what the transformer has learnt so far.

    Samples are read and encoded once, at the first validation.

    Args:
        config: of the run, with the data to validate on.
        world: this process among all.
        velocity: from one micro batch's inputs, given where the first pipeline stage is, to (B, C, F, H, W) on every
            process; all processes call it equally often. As of `Engine.velocity`.
        encode: from a batch of the loader to latents, condition and text, posterior modes, and columns; needed where
            the first stage is.
        decode: from latents (B, C, F, H, W) to a video (B, 3, T, 8 H, 8 W) in [-1, 1]; likewise.
        provenance: what features encoded ahead must have been made by; as of `FlashI2VDataset`.

    Raises:
        InputError: the data file of the validation does not fit the run, or its data cannot be read.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        velocity: Callable[[Batch | None], Tensor],
        encode: Callable[[LoadedBatch], Batch] | None,
        decode: Callable[[Tensor], Tensor] | None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        options = config.options
        self._config, self._world, self._velocity, self._recipe = config, world, velocity, config.recipe
        self._encode, self._decode = encode, decode
        self._data = config.data
        self._provenance = provenance
        self._num_samples = options.eval_iters * options.micro_batch_size
        at_once = options.micro_batch_size * world.dims.data
        self._loss_calls = -(-self._num_samples // at_once)
        self._video_calls = -(-options.eval_videos // at_once)
        num_calls = max(self._loss_calls, self._video_calls)
        self._guidance_scale = config.model.diffusion.guidance_scale
        # Micro batches with their draws, on the CPU; None where the first stage is not.
        self._batches: list[Batch | None] = [None] * num_calls
        self._captions: dict[int, str] = {}  # by number of the sample
        self._videos: dict[int, NDArray[np.uint8]] = {}  # (T, 8 H, 8 W, 3); none where training reads features instead
        self._no_text = torch.empty(0)  # (B, L, text_dim), of the empty prompt
        self._loader = self._open(text_drop_ratio=0.0) if world.embeds else None
        held_out = self._data.dataset_param.held_out_clips
        if options.eval_data is None and not held_out and world.is_first:
            logger.info("--eval-data is not set: validation looks at the training's data, %s", options.mm_data)

    @torch.no_grad()
    def __call__(self, step: int) -> dict[str, float]:
        """Validate after a step; write sampled videos to <save>/validation/step_<step>.

        Returns:
            `validation_loss`, and that of every sigma as `validation_loss/sigma_<sigma>`; where videos are sampled, the
            means of `VIDEO_MEASURES` over them (see `flashi2v_data.video.measures`). Equal on all processes.
        """
        if self._loader is not None:
            self._read(self._loader)
            self._loader = None
        losses = self._losses()
        names = (f"validation_loss/sigma_{sigma}" for sigma in SIGMAS)
        metrics = {"validation_loss": sum(losses) / len(losses), **dict(zip(names, losses, strict=True))}
        # As for losses: one column for every video.
        measured = torch.zeros(len(VIDEO_MEASURES), self._config.options.eval_videos, device=self._world.device)
        for call, batch in enumerate(self._batches[: self._video_calls]):
            latents = self._sample(batch)
            if batch is not None and latents is not None and self._speaks:
                self._show(step, self._numbers(call), batch, latents, measured)
        if self._video_calls:
            means = self._world.sum(measured).cpu().double().mean(dim=1).tolist()
            metrics |= dict(zip(VIDEO_MEASURES, means, strict=True))
        return metrics

    @property
    def _speaks(self) -> bool:
        """Whether this process stands for those that work on the same samples."""
        return self._world.embeds and self._world.peers.rank() == 0

    def _open(self, text_drop_ratio: float) -> StatefulLoader:
        """Open the data in its own order; there may be fewer samples than ranks: the order has no end."""
        world, options = self._world, self._config.options
        param = self._data.dataset_param.model_copy(update={"text_drop_ratio": text_drop_ratio})
        order = self._data.dataloader_param.model_copy(update={"shuffle": False})
        return build_dataloader(
            self._data.model_copy(update={"dataset_param": param, "dataloader_param": order}),
            seed=options.seed,
            batch_size=options.micro_batch_size,
            rank=world.data_rank,
            num_replicas=world.dims.data,
            device=world.device,
            provenance=self._provenance,
            num_required=1,
            held_out=self._data.dataset_param.held_out_clips > 0,
            bucket=self._data.dataset_param.main_bucket,
        )

    def _read(self, loader: StatefulLoader) -> None:
        assert self._encode is not None
        try:
            for call, batch in zip(range(len(self._batches)), loader):
                self._batches[call] = self._take(self._numbers(call), batch)
        finally:
            loader.close()
        options = self._config.options
        if options.eval_videos and self._guidance_scale > 1:
            loader = self._open(text_drop_ratio=1.0)
            try:
                self._no_text = self._encode(next(iter(loader)))["text"].to(self._world.device)
            finally:
                loader.close()

    def _numbers(self, call: int) -> list[int]:
        """Return the numbers of the samples of a micro batch."""
        world, size = self._world, self._config.options.micro_batch_size
        return [i * world.dims.data + world.data_rank for i in range(call * size, (call + 1) * size)]

    def _take(self, numbers: Sequence[int], loaded: LoadedBatch) -> Batch:
        assert self._encode is not None
        for i, number in enumerate(numbers):
            if number < self._config.options.eval_videos:
                self._captions[number] = loaded["caption"][i]
                if "video" in loaded:
                    self._videos[number] = _as_frames(loaded["video"][i])
        keys = [*zip(loaded["epoch"].tolist(), loaded["index"].tolist(), strict=True)]
        seed = self._config.options.seed
        draws = self._recipe.draw(
            self._config, lambda purpose: [generator(seed, f"validation {purpose}", *key) for key in keys]
        )
        return to(self._encode(loaded), "cpu") | draws

    def _losses(self) -> list[float]:
        """Return the mean loss at every sigma, over all samples."""
        device = self._world.device
        # One number for every sample, rather than sums: the mean does not depend on who computed which.
        losses = torch.zeros(len(SIGMAS), self._num_samples, device=device)
        for call, kept in enumerate(self._batches[: self._loss_calls]):
            batch = None if kept is None else to(kept, device)
            for row, sigma in enumerate(SIGMAS):
                if batch is None:
                    self._velocity(None)
                    continue
                batch["sigma"] = torch.full_like(batch["sigma"], sigma)
                velocity = self._velocity(self._recipe.inputs(batch))
                if self._speaks:
                    every = self._recipe.loss(velocity, self._recipe.target(batch))
                    for number, loss in zip(self._numbers(call), every, strict=True):
                        if number < self._num_samples:
                            losses[row, number] = loss
        means: list[float] = self._world.sum(losses).cpu().double().mean(dim=1).tolist()
        return means

    def _sample(self, batch: Batch | None) -> Tensor | None:
        """Integrate from noise to the latents of a micro batch, (B, C, F, H, W).

        Where there is no batch, this process computes its part of the velocities, and its own state means nothing.
        """
        options, device = self._config.options, self._world.device
        scheduler = euler_scheduler(self._config.model.diffusion.shift)
        set_timesteps(scheduler, options.eval_steps, device)
        inputs = None
        noise = torch.zeros(options.micro_batch_size, *self._config.latent_shape)
        if batch is not None:
            inputs, noise = self._recipe.inputs(to(batch, device)), batch["noise"]
            inputs["low_freq_energy_ratio"] = torch.full((len(noise),), _SAMPLING_RATIO, device=device)
        latents = integrate(scheduler, partial(self._guided, inputs), noise.to(device))
        return None if batch is None else latents

    def _guided(self, inputs: Batch | None, y: Tensor, timestep: Tensor) -> Tensor:
        """Return the velocity, away from that of the empty prompt: (B, C, F, H, W) in fp32."""
        negative = None
        if inputs is not None:
            inputs = inputs | {"hidden_states": y, "timestep": timestep.to(y.device).expand(len(y))}
            negative = inputs | {"encoder_hidden_states": self._no_text}
        velocity = self._velocity(inputs).float()
        if self._guidance_scale <= 1:
            return velocity
        return guided(velocity, self._velocity(negative).float(), self._guidance_scale)

    def _show(self, step: int, numbers: Sequence[int], batch: Batch, latents: Tensor, measured: Tensor) -> None:
        """Write videos and film strips, and measure them; neither a full disk nor a broken model ends the run."""
        assert self._decode is not None
        options = self._config.options
        directory = options.save / "validation" / f"step_{step:07d}"
        fps = self._data.dataset_param.train_fps or _DEFAULT_FPS
        for i, number in enumerate(numbers):
            if number >= options.eval_videos:
                continue
            if not latents[i].isfinite().all():
                logger.warning("step %d: sampling video %d ended in NaN or infinity: not written", step, number)
                measured[:, number] = torch.nan
                continue
            frames = _as_frames(self._decode(latents[i : i + 1])[0])
            truth = self._videos.get(number)
            if truth is None:
                truth = _as_frames(self._decode(batch["latents"][i : i + 1].to(latents.device))[0])
            both = (psnr(frames[0], truth[0]), motion(frames), stillness(frames), motion(truth), stillness(truth))
            measured[:, number] = torch.tensor(both)
            try:
                write_video(directory / f"video_{number}.mp4", frames, fps, {"comment": self._captions[number]})
                strip = film_strip(truth[0], frames, truth, caption=self._captions[number])
                with atomic_file(directory / f"strip_{number}.png") as path:
                    strip.save(path)
            except OSError as error:
                logger.warning("step %d: cannot write video %d to %s: %s", step, number, directory, error)


def _as_frames(video: Tensor) -> NDArray[np.uint8]:
    """(3, T, H, W) in [-1, 1] to (T, H, W, 3) in uint8."""
    return (video.float() * 127.5 + 127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0).cpu().numpy()

"""Validation on the way: the loss at fixed sigmas, and sampled videos to look at.

B samples of a micro batch, C latent channels, F latent frames, H W latent grid, T video frames, L text tokens.

Samples are numbered through: number n is the n-th of the data file in its own order, at place n % D of D data parallel
ones. All random draws belong to a sample, so every validation of a run, on every layout, looks at the same ones.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from flashi2v_data.atomic import atomic_file
from flashi2v_data.loading.loader import Batch, StatefulLoader, build_dataloader
from flashi2v_data.randomness import generator
from flashi2v_data.video.strips import film_strip
from flashi2v_data.video.write import write_video
from flashi2v_model.sampling import guided, integrate, set_timesteps
from flashi2v_model.scheduler import NUM_TIMESTEPS, euler_scheduler, interpolate, target
from flashi2v_train.config import RunConfig
from flashi2v_train.features import Features
from flashi2v_train.parallel import World
from flashi2v_train.step import Inputs

logger = logging.getLogger(__name__)

SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
# The cut-off's energy share at inference; the loss is measured at shares from the range of training.
_SAMPLING_RATIO = 0.1
# Of videos whose data file counts in strides instead.
_DEFAULT_FPS = 16.0


@dataclass(frozen=True)
class _MicroBatch:
    """Samples with their draws, on the CPU.

    Attributes:
        numbers: of the samples.
        features: of their videos (posterior modes) and captions.
        noise: (B, C, F, H, W), of the loss at every sigma, and the start of a sampled video.
        ratio: (B,), the cut-off's energy share for the loss.
        captions: of the samples.
        videos: (B, T, 8 H, 8 W, 3) uint8; None where training reads features instead.
    """

    numbers: Sequence[int]
    features: Features
    noise: Tensor
    ratio: Tensor
    captions: Sequence[str]
    videos: NDArray[np.uint8] | None

    def inputs(self, device: torch.device, noisy: Tensor, timestep: Tensor, ratio: Tensor) -> Inputs:
        """Return what the transformer is given for a noisy latent (B, C, F, H, W) at a timestep, a number."""
        text, condition = self.features.context.to(device), self.features.condition.to(device)
        return Inputs(noisy, timestep.to(device).expand(len(noisy)), text, condition, ratio.to(device))


class Validation:
    """Measures and shows what the transformer has learnt so far.

    Samples are read and encoded once, at the first validation.

    Args:
        config: of the run, with the data to validate on.
        world: this process among all.
        velocity: from one micro batch's inputs, given where the first pipeline stage is, to (B, C, F, H, W) on every
            process; all processes call it equally often. As of `Engine.velocity`.
        encode: from a batch to its features, posterior modes; needed where the first stage is.
        decode: from latents (B, C, F, H, W) to a video (B, 3, T, 8 H, 8 W) in [-1, 1]; likewise.
        made_by: what features encoded ahead must have been made by; as of `FlashI2VDataset`.

    Raises:
        InputError: the data file of the validation does not fit the run, or its data cannot be read.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        velocity: Callable[[Inputs | None], Tensor],
        encode: Callable[[Batch], Features] | None,
        decode: Callable[[Tensor], Tensor] | None,
        made_by: Mapping[str, Any] | None = None,
    ) -> None:
        options = config.options
        self._config, self._world, self._velocity = config, world, velocity
        self._encode, self._decode = encode, decode
        self._data = config.data
        self._made_by = made_by
        self._num_samples = options.eval_iters * options.micro_batch_size
        at_once = options.micro_batch_size * world.layout.data
        self._loss_calls = -(-self._num_samples // at_once)
        self._video_calls = -(-options.eval_videos // at_once)
        num_calls = max(self._loss_calls, self._video_calls)
        self._guidance_scale = config.model.diffusion.guidance_scale
        # Where the first stage is not, there is nothing to give the velocity.
        self._batches: list[_MicroBatch | None] = [None] * num_calls
        self._no_text = torch.empty(0)  # (B, L, text_dim), of the empty prompt
        self._loader = self._open(text_drop_ratio=0.0) if world.embeds else None
        if options.eval_data is None and world.is_first:
            logger.info("--eval-data is not set: validation looks at the training's data, %s", options.mm_data)

    @torch.no_grad()
    def __call__(self, step: int) -> dict[str, float]:
        """Validate after a step; write sampled videos to <save>/validation/step_<step>.

        Returns:
            `validation_loss`, and that of every sigma as `validation_loss/sigma_<sigma>`; equal on all processes.
        """
        if self._loader is not None:
            self._read(self._loader)
            self._loader = None
        losses = self._losses()
        for batch in self._batches[: self._video_calls]:
            latents = self._sample(batch)
            if batch is not None and latents is not None and self._speaks:
                self._show(step, batch, latents)
        names = (f"validation_loss/sigma_{sigma}" for sigma in SIGMAS)
        return {"validation_loss": sum(losses) / len(losses), **dict(zip(names, losses, strict=True))}

    @property
    def _speaks(self) -> bool:
        """Whether this process stands for those that work on the same samples."""
        return self._world.embeds and self._world.peers.rank() == 0

    def _open(self, text_drop_ratio: float) -> StatefulLoader:
        """Open the data in its own order; there may be fewer samples than places: the order has no end."""
        world, options = self._world, self._config.options
        param = self._data.dataset_param.model_copy(update={"text_drop_ratio": text_drop_ratio})
        order = self._data.dataloader_param.model_copy(update={"shuffle": False})
        return build_dataloader(
            self._data.model_copy(update={"dataset_param": param, "dataloader_param": order}),
            seed=options.seed,
            batch_size=options.micro_batch_size,
            rank=world.data_rank,
            num_replicas=world.layout.data,
            device=world.device,
            made_by=self._made_by,
            num_required=1,
        )

    def _read(self, loader: StatefulLoader) -> None:
        assert self._encode is not None
        options, world = self._config.options, self._world
        try:
            for call, batch in zip(range(len(self._batches)), loader):
                first = call * options.micro_batch_size
                numbers = [(first + i) * world.layout.data + world.data_rank for i in range(options.micro_batch_size)]
                self._batches[call] = self._take(numbers, batch)
        finally:
            loader.close()
        if options.eval_videos and self._guidance_scale > 1:
            loader = self._open(text_drop_ratio=1.0)
            try:
                self._no_text = self._encode(next(iter(loader))).context.to(self._world.device)
            finally:
                loader.close()

    def _take(self, numbers: Sequence[int], batch: Batch) -> _MicroBatch:
        assert self._encode is not None
        keys = [*zip(batch["epoch"].tolist(), batch["index"].tolist(), strict=True)]
        low, high = self._config.model.predictor.low_freq_energy_ratio
        features = self._encode(batch)
        shown = numbers[0] < self._config.options.eval_videos and "video" in batch
        return _MicroBatch(
            numbers,
            Features(features.latents.cpu(), features.condition.cpu(), features.context.cpu()),
            noise=torch.stack(
                [torch.randn(self._config.latent_shape, generator=g) for g in self._generators("noise", keys)]
            ),
            ratio=torch.cat([low + (high - low) * torch.rand(1, generator=g) for g in self._generators("ratio", keys)]),
            captions=batch["caption"],
            videos=np.stack([_as_frames(video) for video in batch["video"]]) if shown else None,
        )

    def _generators(self, purpose: str, keys: Sequence[tuple[int, int]]) -> list[torch.Generator]:
        seed = self._config.options.seed
        return [generator(seed, f"validation {purpose}", epoch, index) for epoch, index in keys]

    def _losses(self) -> list[float]:
        """Return the mean squared error at every sigma, over all samples."""
        device = self._world.device
        # One place for every sample, rather than sums: the mean does not depend on who computed which.
        errors = torch.zeros(len(SIGMAS), self._num_samples, device=device)
        for batch in self._batches[: self._loss_calls]:
            if batch is not None:
                latents, noise = batch.features.latents.to(device), batch.noise.to(device)
            for row, sigma in enumerate(SIGMAS):
                inputs = None
                if batch is not None:
                    noisy = interpolate(latents, noise, torch.full((len(latents),), sigma))
                    inputs = batch.inputs(device, noisy, torch.tensor(NUM_TIMESTEPS * sigma), batch.ratio)
                velocity = self._velocity(inputs)
                if batch is None or not self._speaks:
                    continue
                every = F.mse_loss(velocity.float(), target(latents, noise), reduction="none").mean(dim=(1, 2, 3, 4))
                for number, error in zip(batch.numbers, every, strict=True):
                    if number < self._num_samples:
                        errors[row, number] = error
        means: list[float] = self._world.sum(errors).cpu().double().mean(dim=1).tolist()
        return means

    def _sample(self, batch: _MicroBatch | None) -> Tensor | None:
        """Integrate from noise to the latents of a micro batch, (B, C, F, H, W).

        Where there is no batch, this process computes its part of the velocities, and its own state means nothing.
        """
        options, device = self._config.options, self._world.device
        scheduler = euler_scheduler(self._config.model.diffusion.shift)
        set_timesteps(scheduler, options.eval_steps, device)
        shape = (options.micro_batch_size, *self._config.latent_shape)
        noise = torch.zeros(shape) if batch is None else batch.noise
        latents = integrate(scheduler, partial(self._guided, batch), noise.to(device))
        return None if batch is None else latents

    def _guided(self, batch: _MicroBatch | None, y: Tensor, timestep: Tensor) -> Tensor:
        """Return the velocity, away from that of the empty prompt: (B, C, F, H, W) in fp32."""
        ratio = torch.full((len(y),), _SAMPLING_RATIO)
        inputs = None if batch is None else batch.inputs(self._world.device, y, timestep, ratio)
        velocity = self._velocity(inputs).float()
        if self._guidance_scale <= 1:
            return velocity
        negative = None if inputs is None else replace(inputs, text=self._no_text)
        return guided(velocity, self._velocity(negative).float(), self._guidance_scale)

    def _show(self, step: int, batch: _MicroBatch, latents: Tensor) -> None:
        """Write videos and film strips; neither a full disk nor a broken model ends the run."""
        assert self._decode is not None
        options = self._config.options
        directory = options.save / "validation" / f"step_{step:07d}"
        fps = self._data.dataset_param.train_fps or _DEFAULT_FPS
        for i, number in enumerate(batch.numbers):
            if number >= options.eval_videos:
                continue
            if not latents[i].isfinite().all():
                logger.warning("step %d: sampling video %d ended in NaN or infinity: not written", step, number)
                continue
            frames = _as_frames(self._decode(latents[i : i + 1])[0])
            if batch.videos is None:
                truth = _as_frames(self._decode(batch.features.latents[i : i + 1].to(latents.device))[0])
            else:
                truth = batch.videos[i]
            try:
                write_video(directory / f"video_{number}.mp4", frames, fps, {"comment": batch.captions[i]})
                strip = film_strip(truth[0], frames, truth, caption=batch.captions[i])
                with atomic_file(directory / f"strip_{number}.png") as path:
                    strip.save(path)
            except OSError as error:
                logger.warning("step %d: cannot write video %d to %s: %s", step, number, directory, error)


def _as_frames(video: Tensor) -> NDArray[np.uint8]:
    """(3, T, H, W) in [-1, 1] to (T, H, W, 3) in uint8."""
    return (video.float() * 127.5 + 127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0).cpu().numpy()

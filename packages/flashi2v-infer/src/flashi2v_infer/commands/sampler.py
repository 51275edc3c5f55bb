"""One video, and what is known about it. T frames, H W height and width."""

import hashlib
import itertools
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from diffusers.callbacks import PipelineCallback
from numpy.typing import NDArray
from torch import Tensor

from flashi2v_data.randomness import generator
from flashi2v_data.video.measures import psnr
from flashi2v_infer.arguments import prepare_image
from flashi2v_infer.decoding import decode_within_memory
from flashi2v_infer.files.pictures import Pixels
from flashi2v_infer.output import FlashI2VPipelineOutput
from flashi2v_infer.pipeline import FlashI2VPipeline, StepCallback
from flashi2v_infer.settings import Request
from flashi2v_model.encoders import encode_video

logger = logging.getLogger(__name__)

# A first frame below this PSNR is visibly another picture, unless the VAE itself does hardly better on the image.
_POOR_PSNR, _TOLERANCE = 20.0, 6.0
# A second frame is another picture where it changes so many levels, and so many times as much as frames do later.
_JUMP, _JUMP_RATIO = 6.0, 3.0


@dataclass(frozen=True)
class Sample:
    """A sampled video.

    Attributes:
        frames: (T, H, W, 3), uint8.
        first_frame_psnr: between the first frame and the image it was to start with, in dB.
        vae_psnr: between the image and its reconstruction by the VAE alone, in dB: what can be expected at best.
        decoding: in words, in which way the VAE decoded it.
        calls: of the network that were made and skipped; None where all were made.
    """

    frames: NDArray[np.uint8]
    first_frame_psnr: float
    vae_psnr: float
    decoding: str | None
    calls: dict[str, Any] | None = None

    @property
    def starts_elsewhere(self) -> bool:
        """Whether the video does not start with the image, and the VAE is not the reason."""
        return self.first_frame_psnr < min(_POOR_PSNR, self.vae_psnr - _TOLERANCE)

    @cached_property
    def changes(self) -> NDArray[np.float64]:
        """Mean changes from frame to frame, (T - 1,), in levels of 255."""
        return np.array([np.abs(b.astype(int) - a).mean() for a, b in itertools.pairwise(self.frames)])

    @property
    def jumps(self) -> bool:
        """Whether the second frame does not continue the first."""
        if len(self.changes) < 2:
            return False
        return bool(self.changes[0] > max(_JUMP, _JUMP_RATIO * np.median(self.changes[1:])))


class Sampler:
    """Samples videos one by one and compares their first frames with the images.

    Args:
        pipeline: any `FlashI2VPipeline`.
        texts: states (1, L, text_dim) of all prompts, negative ones too, from `placement.encode_prompts`.
        on_step_end: the pipeline's `callback_on_step_end`.
    """

    def __init__(
        self,
        pipeline: FlashI2VPipeline,
        texts: Mapping[str, Tensor],
        *,
        on_step_end: StepCallback | PipelineCallback | None = None,
    ) -> None:
        self.pipeline = pipeline
        self._texts = texts
        self._on_step_end = on_step_end
        # Many videos of a batch may start with one image.
        self._vae_psnr: dict[bytes, float] = {}

    def __call__(self, request: Request, image: Pixels) -> Sample:
        """Sample one video.

        Args:
            request: what to sample.
            image: (H, W, 3), already of the video's size.

        Raises:
            FloatingPointError: sampling ended in NaN or infinity.
        """
        numbers = asdict(request.settings)
        negative_text = self._texts[request.negative_prompt] if request.settings.uses_negative_prompt else None
        output = self.pipeline(
            image=image,
            prompt_embeds=self._texts[request.prompt],
            negative_prompt_embeds=negative_text,
            callback_on_step_end=self._on_step_end,
            generator=generator(request.seed, "noise", 0, request.index),
            output_type="np",
            plan=numbers.pop("speed"),
            **numbers,
        )
        assert isinstance(output, FlashI2VPipelineOutput)
        frames = _as_pixels(np.asarray(output.frames)[0])
        sample = Sample(frames, psnr(frames[0], image), self._best_psnr(image), output.decoding, output.calls)
        logger.info(
            "video %d: first frame %.1f dB PSNR against the image (the VAE alone %.1f dB)",
            request.index,
            sample.first_frame_psnr,
            sample.vae_psnr,
        )
        if sample.starts_elsewhere:
            logger.warning(
                "video %d does not start with its image: check that the weights are those of a trained FlashI2V model "
                "and that guidance_scale and low_freq_energy_ratio are near 5 and 0.1",
                request.index,
            )
        elif sample.jumps:
            logger.warning(
                "video %d jumps after its first frame, by %.0f levels where later frames change by %.0f: the image may "
                "be unlike what the model knows; more steps or another seed may help",
                request.index,
                sample.changes[0],
                np.median(sample.changes[1:]),
            )
        return sample

    def _best_psnr(self, image: Pixels) -> float:
        key = hashlib.blake2b(image.tobytes()).digest()
        if key not in self._vae_psnr:
            self._vae_psnr[key] = psnr(_reconstruct(self.pipeline, image), image)
        return self._vae_psnr[key]


@torch.no_grad()
def _reconstruct(pipeline: FlashI2VPipeline, image: Pixels) -> Pixels:
    """Encode and decode one picture: (H, W, 3)."""
    frame = prepare_image(image, *image.shape[:2])[None].to(pipeline._execution_device)  # (1, 3, 1, H, W)
    decoded, _ = decode_within_memory(pipeline.vae, encode_video(pipeline.vae, frame), pipeline.execution)
    return _as_pixels((decoded[0, :, 0].permute(1, 2, 0) / 2 + 0.5).cpu().numpy())


def _as_pixels(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    return (values * 255).round().astype(np.uint8)

"""Image-to-video sampling as a diffusers pipeline.

B videos, C latent channels, T video frames, F latent frames, H W latent grid, L text tokens.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from flashi2v_data.errors import InputError
from flashi2v_data.transforms import center_crop_resize, normalise, to_tensor
from flashi2v_infer.denoising import Generators, denoise, set_timesteps
from flashi2v_infer.inputs import AnyImage, as_pixels, tidy
from flashi2v_infer.settings import SamplingSettings, check_negative_prompt
from flashi2v_model import FlashI2VTransformer3DModel, guide
from flashi2v_model.encoders import SPATIAL_STRIDE, TEMPORAL_STRIDE, decode_video, encode_text, encode_video

logger = logging.getLogger(__name__)

OutputType: TypeAlias = Literal["pil", "np", "pt", "latent"]
AnyFrames: TypeAlias = list[list[Image.Image]] | NDArray[np.float32] | Tensor


@dataclass
class FlashI2VPipelineOutput(BaseOutput):
    """What the pipeline returns.

    Attributes:
        frames: "pil": a list of T images for every video; "np": (B, T, 8H, 8W, 3) in [0, 1]; "pt": (B, T, 3, 8H, 8W)
            in [0, 1]; "latent": (B, C, F, H, W), normalised.
    """

    frames: AnyFrames


class FlashI2VPipeline(DiffusionPipeline):
    """Samples videos that start with an image and follow a prompt.

    Args:
        tokenizer: of the text encoder.
        text_encoder: UMT5.
        vae: Wan2.1's.
        transformer: the velocity network.
        scheduler: flow-matching; its `shift` is 7 in the released model.
        use_attention_mask: hide padding from the text encoder's own attention, as Wan2.1 does.

    Raises:
        InputError: the transformer is not one of FlashI2V.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: UMT5EncoderModel,
        vae: AutoencoderKLWan,
        transformer: FlashI2VTransformer3DModel,
        scheduler: SchedulerMixin,
        use_attention_mask: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(transformer, FlashI2VTransformer3DModel):
            raise InputError(
                f"the transformer is a {type(transformer).__name__}, which no first frame can guide: "
                "give a FlashI2VTransformer3DModel"
            )
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
        )
        self.register_to_config(use_attention_mask=use_attention_mask)
        self.video_processor = VideoProcessor(vae_scale_factor=SPATIAL_STRIDE)

    @torch.no_grad()
    def __call__(
        self,
        image: AnyImage | Sequence[AnyImage],
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        num_frames: int = 49,
        height: int = 480,
        width: int = 832,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        low_freq_energy_ratio: float = 0.1,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        output_type: OutputType = "pil",
        max_sequence_length: int | None = None,
        return_dict: bool = True,
    ) -> FlashI2VPipelineOutput | tuple[AnyFrames]:
        """Sample one video for every image and prompt.

        Args:
            image: the first frame, any size: resized to cover height and width, then cropped in the middle. PIL, an
                array (height, width, 3), a tensor (3, height, width), numbers uint8 or floats in [0, 1]; or a list.
            prompt: what happens; as many as images.
            negative_prompt: what should not; one for all videos or one for each. None is the empty prompt.
            num_frames: T, 4k + 1.
            height: in pixels, divisible by 16.
            width: in pixels, divisible by 16.
            num_inference_steps: of the sampler.
            guidance_scale: weight of the prompt; up to 1 there is no negative prompt and half the work.
            low_freq_energy_ratio: in [0, 1], where the frequencies of the first frame that guide the video start.
            generator: of the noise; a list of one for each video makes a batch equal to its videos one by one.
            latents: (B, C, F, H, W), standard normal noise to start from, instead of drawing it.
            output_type: see `FlashI2VPipelineOutput`.
            max_sequence_length: L, text tokens that the transformer attends to, padding included; it should be the
                number that it was trained with. None: the transformer config's `text_len`.
            return_dict: return a `FlashI2VPipelineOutput` instead of a tuple.

        Raises:
            InputError: an argument cannot be used; the message says what can.
            FloatingPointError: sampling ended in NaN or infinity.
        """
        settings = SamplingSettings(
            num_frames=num_frames,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            low_freq_energy_ratio=low_freq_energy_ratio,
            max_sequence_length=max_sequence_length,
        )
        if output_type not in ("pil", "np", "pt", "latent"):
            raise InputError(f"output_type must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}")
        images, prompts, negatives = _requests(image, prompt, negative_prompt, settings)
        device = self._execution_device
        noise = self._noise(len(prompts), settings, generator, latents)

        first_frames = torch.stack([prepare_image(image, height, width) for image in images])  # (B, 3, 1, 8H, 8W)
        condition = encode_video(self.vae, first_frames.to(device))  # (B, C, 1, H, W)
        guidance = guide(self.transformer, condition, noise.shape[2], low_freq_energy_ratio)
        text = self.encode_prompt(prompts, max_sequence_length)
        negative_text = self.encode_prompt(negatives, max_sequence_length) if settings.uses_negative_prompt else None

        set_timesteps(self.scheduler, num_inference_steps, device)
        denoised = denoise(
            self.transformer,
            self.scheduler,
            noise,
            guidance,
            text,
            negative_text,
            guidance_scale,
            generator=generator,
            progress=self.progress_bar,
        )
        frames = denoised
        if output_type != "latent":
            frames = self.video_processor.postprocess_video(decode_video(self.vae, denoised), output_type)
        return FlashI2VPipelineOutput(frames=frames) if return_dict else (frames,)

    def encode_prompt(self, prompts: list[str], max_sequence_length: int | None = None) -> Tensor:
        """Return the text encoder's states, padding zeroed: (B, L, text_dim). Cuts long prompts, with a warning."""
        prompts = [tidy(prompt) for prompt in prompts]
        max_sequence_length = max_sequence_length or self.transformer.config.text_len
        tokens = self.tokenizer(
            prompts, max_length=max_sequence_length, padding="max_length", truncation=True, return_tensors="pt"
        )
        for prompt, full in zip(prompts, tokens.attention_mask.bool().all(1).tolist()):
            # Only a full row may have been cut.
            if full and (length := len(self.tokenizer(prompt).input_ids)) > max_sequence_length:
                logger.warning(
                    "a prompt has %d tokens, of which the first %d are read: %.60s...",
                    length,
                    max_sequence_length,
                    prompt,
                )
        ids, mask = tokens.input_ids.to(self._execution_device), tokens.attention_mask
        return encode_text(self.text_encoder, ids, mask, use_mask=self.config.use_attention_mask)

    def _noise(
        self, num_videos: int, settings: SamplingSettings, generator: Generators | None, latents: Tensor | None
    ) -> Tensor:
        shape = (
            num_videos,
            self.transformer.config.in_channels,
            (settings.num_frames - 1) // TEMPORAL_STRIDE + 1,
            settings.height // SPATIAL_STRIDE,
            settings.width // SPATIAL_STRIDE,
        )
        if isinstance(generator, list) and len(generator) != num_videos:
            raise InputError(f"give one generator, or one for each of the {num_videos} videos, got {len(generator)}")
        if latents is None:
            return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise InputError(f"latents must be {shape} for these images and settings, got {tuple(latents.shape)}")
        return latents.to(self._execution_device)


def _as_list(image: AnyImage | Sequence[AnyImage]) -> list[AnyImage]:
    if isinstance(image, (list, tuple)):
        return list(image)
    if isinstance(image, (np.ndarray, Tensor)) and image.ndim == 4:
        return [image[i] for i in range(len(image))]
    return [image]  # type: ignore[list-item]  # no other sequence is an image


def prepare_image(image: AnyImage, height: int, width: int) -> Tensor:
    """Resize and crop a picture as training does: (3, 1, height, width) in [-1, 1]."""
    return normalise(to_tensor(center_crop_resize(as_pixels(image)[None], height, width)))


def _requests(
    image: AnyImage | Sequence[AnyImage],
    prompt: str | list[str],
    negative_prompt: str | list[str] | None,
    settings: SamplingSettings,
) -> tuple[list[AnyImage], list[str], list[str]]:
    """Turn one or many into lists of the same length."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    images = _as_list(image)
    if len(images) != len(prompts) or not prompts:
        raise InputError(f"give one image for every prompt, got {len(images)} images and {len(prompts)} prompts")
    if negative_prompt is None or isinstance(negative_prompt, str):
        negatives = [negative_prompt or ""] * len(prompts)
    else:
        negatives = list(negative_prompt)
    if len(negatives) != len(prompts):
        raise InputError(f"give one negative prompt, or one for each of {len(prompts)} prompts, got {len(negatives)}")
    for negative in negatives:
        check_negative_prompt(negative, settings)
    return images, prompts, negatives

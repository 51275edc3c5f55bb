"""Image-to-video sampling as a diffusers pipeline.

B videos, C latent channels, T video frames, F latent frames, H W latent grid, L text tokens.
"""

import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, SchedulerMixin
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from flashi2v_data.errors import InputError
from flashi2v_data.loading.transforms import center_crop_resize, normalise, to_tensor
from flashi2v_infer.decoding import decode_within_memory
from flashi2v_infer.execution import Execution
from flashi2v_infer.files.inputs import tidy
from flashi2v_infer.files.pictures import AnyImage, as_pixels
from flashi2v_infer.lora import LoraMixin
from flashi2v_infer.model_index import check_model_index
from flashi2v_infer.settings import SamplingSettings, check_negative_prompt
from flashi2v_model import FlashI2VTransformer3DModel
from flashi2v_model.config import SPATIAL_STRIDE
from flashi2v_model.encoders import encode_text, encode_video
from flashi2v_model.sampling import Generators, set_timesteps
from flashi2v_model.sampling import denoise as denoise
from flashi2v_npu_ops import route_conv3d

logger = logging.getLogger(__name__)

OutputType: TypeAlias = Literal["pil", "np", "pt", "latent"]
Conditioning: TypeAlias = float | Sequence[float] | Tensor
AnyFrames: TypeAlias = list[list[Image.Image]] | NDArray[np.float32] | Tensor
StepCallback: TypeAlias = Callable[["FlashI2VPipeline", int, Tensor, dict[str, Any]], dict[str, Any] | None]


@dataclass
class FlashI2VPipelineOutput(BaseOutput):
    """What the pipeline returns.

    Attributes:
        frames: "pil": a list of T images for every video; "np": (B, T, 8H, 8W, 3) in [0, 1]; "pt": (B, T, 3, 8H, 8W)
            in [0, 1]; "latent": (B, C, F, H, W), normalised.
        decoding: in words, in which way the VAE decoded; None for latents.
    """

    frames: AnyFrames
    decoding: str | None = None


class FlashI2VPipeline(DiffusionPipeline, LoraMixin):
    """Samples videos that start with an image and follow a prompt.

    Args:
        tokenizer: of the text encoder.
        text_encoder: UMT5. Both may be None where every call gives `prompt_embeds`.
        vae: Wan2.1's.
        transformer: the velocity network.
        scheduler: flow-matching; its `shift` is 7 in the released model.
        use_attention_mask: hide padding from the text encoder's own attention, as Wan2.1 does.

    Raises:
        InputError: the transformer is not one of FlashI2V.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["tokenizer", "text_encoder"]  # noqa: RUF012 (diffusers declares it so)
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012 (diffusers declares it so)

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        text_encoder: UMT5EncoderModel | None,
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
        route_conv3d(vae)
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
        )
        # A saved pipeline names FlashI2V's own class, whatever variant this is: no file names a class to be imported.
        network = FlashI2VTransformer3DModel
        self.register_to_config(
            use_attention_mask=use_attention_mask, transformer=(network.__module__, network.__name__)
        )
        self.video_processor = VideoProcessor(vae_scale_factor=SPATIAL_STRIDE)
        self.execution = Execution()
        self._interrupt = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load a directory in diffusers' layout or a model of the hub; no code of it is run, nor found by its names.

        Args:
            pretrained_model_name_or_path: the directory or hub id.
            kwargs: as of `diffusers.DiffusionPipeline.from_pretrained`.

        Raises:
            InputError: the directory names other classes than those of this pipeline.
        """
        path = os.fspath(pretrained_model_name_or_path)
        if not os.path.isdir(path):
            path = cls.download(path, **kwargs)
        check_model_index(Path(path), cls.__name__)
        return super().from_pretrained(path, **kwargs)

    @property
    def interrupt(self) -> bool:
        """Whether sampling stops after this step: a callback may set `pipe._interrupt`."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        image: AnyImage | Sequence[AnyImage],
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        num_frames: int = 49,
        height: int = 480,
        width: int = 832,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        low_freq_energy_ratio: float = 0.1,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: OutputType = "pil",
        max_sequence_length: int | None = None,
        cfg_batch: bool | None = None,
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        conditioning: Mapping[str, Conditioning] | None = None,
    ) -> FlashI2VPipelineOutput | tuple[AnyFrames]:
        """Sample one video for every image and prompt.

        Args:
            image: the first frame, any size: resized to cover height and width, then cropped in the middle. PIL, an
                array (height, width, 3), a tensor (3, height, width), numbers uint8 or floats in [0, 1]; or a list.
            prompt: what happens; as many as images. None where `prompt_embeds` says it.
            negative_prompt: what should not; one for all videos or one for each. None is the empty prompt.
            num_frames: T, 4k + 1.
            height: in pixels, divisible by 16.
            width: in pixels, divisible by 16.
            num_inference_steps: of the sampler.
            guidance_scale: weight of the prompt; up to 1 there is no negative prompt and half the work.
            low_freq_energy_ratio: in [0, 1], where the frequencies of the first frame that guide the video start.
            generator: of the noise; a list of one for each video makes a batch equal to its videos one by one.
            latents: (B, C, F, H, W), standard normal noise to start from, instead of drawing it.
            prompt_embeds: (B, L, text_dim), from `encode_prompt`, instead of `prompt`.
            negative_prompt_embeds: likewise, instead of `negative_prompt`; it goes with `prompt_embeds`.
            output_type: see `FlashI2VPipelineOutput`.
            max_sequence_length: L, text tokens that the transformer attends to, padding included; it should be the
                number that it was trained with. None: the transformer config's `text_len`.
            cfg_batch: run both branches of guidance as one batch: a little faster where memory allows it. None: as
                `execution` says.
            return_dict: return a `FlashI2VPipelineOutput` instead of a tuple.
            callback_on_step_end: called as `callback(pipe, step, timestep, {"latents": y})` after every step; the
                "latents" of the dict that it returns take the place of y; None leaves y as it is. It ends the run by
                `pipe._interrupt = True`.
            callback_on_step_end_tensor_inputs: what the callback is given; there is nothing but "latents".
            conditioning: what a variant of the transformer asks for, by name: a number or a list of them for all
                videos, or a tensor with a row for each, (B,) or (B, n).

        Raises:
            InputError: an argument cannot be used; the message says what can.
            FloatingPointError: sampling ended in NaN or infinity.
        """
        numbers = (num_frames, height, width, num_inference_steps, guidance_scale, low_freq_energy_ratio)
        settings = SamplingSettings(*numbers, max_sequence_length)
        if output_type not in get_args(OutputType):
            raise InputError(f"output_type must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}")
        if callback_on_step_end is not None and (unknown := {*callback_on_step_end_tensor_inputs} - {"latents"}):
            raise InputError(f"callback_on_step_end_tensor_inputs: there is only 'latents', not {sorted(unknown)}")
        images = _as_list(image)
        prompts = _prompts(prompt, prompt_embeds, len(images))
        negatives = _negative_prompts(negative_prompt, negative_prompt_embeds, len(images), settings)
        device, noise = self._execution_device, self._noise(len(images), settings, generator, latents)
        self._interrupt = False
        _warn_of_attention_backend()
        more = self._conditioning(conditioning or {}, len(images))
        text = self._embedded(prompts, max_sequence_length)
        negative_text = self._embedded(negatives, max_sequence_length) if settings.uses_negative_prompt else None
        first_frames = torch.stack([prepare_image(image, height, width) for image in images])  # (B, 3, 1, 8H, 8W)
        condition = encode_video(self.vae, first_frames.to(device))  # (B, C, 1, H, W)
        set_timesteps(self.scheduler, num_inference_steps, device)
        denoised = denoise(
            self.transformer,
            self.scheduler,
            noise,
            condition,
            text,
            negative_text,
            guidance_scale,
            low_freq_energy_ratio,
            cfg_batch=self.execution.cfg_batch if cfg_batch is None else cfg_batch,
            conditioning=more,
            generator=generator,
            progress=self.progress_bar,
            on_step=partial(self._on_step, callback_on_step_end),
        )
        output = self._decoded(denoised, output_type)
        self.maybe_free_model_hooks()  # with offloading by diffusers, the last part leaves the device too
        return output if return_dict else (output.frames,)

    def _on_step(self, callback: StepCallback | None, step: int, timestep: Tensor, y: Tensor) -> Tensor | None:
        """Return the state to go on with; None ends the run."""
        if callback is not None:
            y = (callback(self, step, timestep, {"latents": y}) or {}).get("latents", y)
        return None if self._interrupt else y

    def _decoded(self, latents: Tensor, output_type: OutputType) -> FlashI2VPipelineOutput:
        if output_type == "latent":
            return FlashI2VPipelineOutput(frames=latents)
        video, decoding = decode_within_memory(self.vae, latents, self.execution)
        frames = self.video_processor.postprocess_video(video, output_type)
        return FlashI2VPipelineOutput(frames=frames, decoding=decoding)

    @torch.no_grad()
    def encode_prompt(self, prompts: str | Sequence[str], max_sequence_length: int | None = None) -> Tensor:
        """Return the text encoder's states, padding zeroed: (B, L, text_dim). Cuts long prompts, with a warning.

        Args:
            prompts: one for each of the B videos; a string is one prompt.
            max_sequence_length: L; None: the transformer config's `text_len`.

        Raises:
            InputError: there is no text encoder, or a prompt is no string.
        """
        if self.text_encoder is None or self.tokenizer is None:
            raise InputError("there is no text encoder: give prompt_embeds and negative_prompt_embeds")
        prompts = [tidy(prompt) for prompt in _as_texts(prompts, "prompt")]
        distinct = list(dict.fromkeys(prompts))
        max_sequence_length = max_sequence_length or self.transformer.config.text_len
        tokens = self.tokenizer(
            distinct, max_length=max_sequence_length, padding="max_length", truncation=True, return_tensors="pt"
        )
        for prompt, full in zip(distinct, tokens.attention_mask.bool().all(1).tolist()):
            # Only a full row may have been cut.
            if full and (length := len(self.tokenizer(prompt).input_ids)) > max_sequence_length:
                logger.warning(
                    "a prompt has %d tokens, of which the first %d are read: %.60s...",
                    length,
                    max_sequence_length,
                    prompt,
                )
        ids, mask = tokens.input_ids.to(self._execution_device), tokens.attention_mask
        states = encode_text(self.text_encoder, ids, mask, use_mask=self.config.use_attention_mask)
        return states[[distinct.index(prompt) for prompt in prompts]]

    def _embedded(self, prompts: list[str] | Tensor, max_sequence_length: int | None) -> Tensor:
        if isinstance(prompts, Tensor):
            return prompts.to(self._execution_device)
        return self.encode_prompt(prompts, max_sequence_length)

    def _conditioning(self, given: Mapping[str, Conditioning], num_videos: int) -> dict[str, Tensor]:
        """Return further tensors of the network, with a row for each video."""
        check_conditioning(self.transformer, given)
        tensors = {}
        for name, value in given.items():
            if isinstance(value, Tensor):
                if not value.ndim or len(value) != num_videos:
                    raise InputError(f"conditioning: {name} must have a row for each of {num_videos} videos")
                tensors[name] = value.to(self._execution_device, torch.float32)
                continue
            tensor = torch.tensor(value, dtype=torch.float32, device=self._execution_device)
            tensors[name] = tensor.expand(num_videos, *tensor.shape)
        return tensors

    def _noise(
        self, num_videos: int, settings: SamplingSettings, generator: Generators | None, latents: Tensor | None
    ) -> Tensor:
        shape = (num_videos, self.transformer.config.in_channels, *settings.latent_grid)
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


def _warn_of_attention_backend() -> None:
    """Warn where `diffusers.attention_backend` asks for other kernels: it may be meant for another model."""
    backend, _ = _AttentionBackendRegistry.get_active_backend()
    if backend is not AttentionBackendName.NATIVE:
        logger.warning(
            "diffusers' attention backend %s has no effect here: flashi2v_npu_ops.set_backend('attention', ...) "
            "chooses the kernel of this transformer",
            AttentionBackendName(backend).value,
        )


def _as_texts(texts: str | Sequence[str], name: str) -> list[str]:
    """Return prompts as a list: a string is one of them, not a sequence of letters."""
    found = [texts] if isinstance(texts, (str, bytes)) else list(texts)
    if odd := [type(text).__name__ for text in found if not isinstance(text, str)]:
        raise InputError(f"{name} must be a string or a list of them, got {odd[0]}")
    return found


def check_conditioning(transformer: FlashI2VTransformer3DModel, given: Collection[str]) -> None:
    """Refuse names of conditioning that are not those that a transformer asks for.

    Raises:
        InputError: naming both.
    """
    wanted = transformer.conditioning_names
    if sorted(given) != sorted(wanted):
        raise InputError(
            f"conditioning: this {type(transformer).__name__} asks for {', '.join(wanted) or 'none'}, got "
            f"{', '.join(sorted(given)) or 'none'}"
        )


def prepare_image(image: AnyImage, height: int, width: int) -> Tensor:
    """Resize and crop a picture as training does: (3, 1, height, width) in [-1, 1]."""
    return normalise(to_tensor(center_crop_resize(as_pixels(image)[None], height, width)))


def _prompts(prompt: str | list[str] | None, embeds: Tensor | None, num_images: int) -> list[str] | Tensor:
    """Return what was given, one for every image."""
    if (prompt is None) == (embeds is None):
        raise InputError("give one of prompt and prompt_embeds")
    prompts = embeds if embeds is not None else _as_texts(() if prompt is None else prompt, "prompt")
    if len(prompts) != num_images or not num_images:
        raise InputError(f"give one image for every prompt, got {num_images} images and {len(prompts)} prompts")
    return prompts


def _negative_prompts(
    prompt: str | list[str] | None, embeds: Tensor | None, num_videos: int, settings: SamplingSettings
) -> list[str] | Tensor:
    """Return what was given, one for every video."""
    if embeds is None:
        texts = _as_texts("" if prompt is None else prompt, "negative_prompt")
        negatives = texts * num_videos if prompt is None or isinstance(prompt, str) else texts
        for negative in negatives:
            check_negative_prompt(negative, settings)
    elif prompt is not None:
        raise InputError("give one of negative_prompt and negative_prompt_embeds")
    elif not settings.uses_negative_prompt:
        raise InputError(f"negative_prompt_embeds have no effect with guidance_scale {settings.guidance_scale}")
    given = negatives if embeds is None else embeds
    if len(given) != num_videos:
        raise InputError(f"give one negative prompt, or one for each of {num_videos} prompts, got {len(given)}")
    return given

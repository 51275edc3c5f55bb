"""Image-to-video sampling as a diffusers pipeline.

B videos, C latent channels, T video frames, F latent frames, H W latent grid, L text tokens.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import diffusers
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from torch import Tensor
from transformers import PreTrainedTokenizerBase, T5EncoderModel, UMT5EncoderModel

from flashi2v_data.errors import InputError
from flashi2v_infer.arguments import (
    Conditioning,
    Picture,
    check_conditioning,
    conditioning_tensors,
    negatives_of,
    num_prompts_of,
    pictures_of,
    prepare_image,
    texts_of,
)
from flashi2v_infer.decoding import decode_within_memory
from flashi2v_infer.defaults import checked, directory_of, fps_of, remark, settings_of
from flashi2v_infer.execution import Execution
from flashi2v_infer.files.inputs import tidy
from flashi2v_infer.lora import LoraMixin
from flashi2v_infer.model_index import check_model_index
from flashi2v_infer.output import AnyFrames, FlashI2VPipelineOutput
from flashi2v_infer.preview import PreviewMixin
from flashi2v_infer.publishing import hub_options, upload, write_beside
from flashi2v_infer.settings import SamplingSettings
from flashi2v_infer.single_file import SingleFileMixin
from flashi2v_infer.speed import SpeedMixin
from flashi2v_model import FlashI2VTransformer3DModel
from flashi2v_model.config import SPATIAL_STRIDE
from flashi2v_model.encoders import encode_text, encode_video
from flashi2v_model.sampling import Generators, VelocityField, set_timesteps
from flashi2v_model.sampling import denoise as denoise
from flashi2v_model.scheduler import fitted
from flashi2v_model.speed.choice import as_record
from flashi2v_model.speed.plan import SamplingPlan, plan_of
from flashi2v_npu_ops import route_conv3d

logger = logging.getLogger(__name__)

OutputType: TypeAlias = Literal["pil", "np", "pt", "latent"]
StepCallback: TypeAlias = Callable[["FlashI2VPipeline", int, Tensor, dict[str, Any]], dict[str, Any] | None]

_USUAL_TEXT_LENGTH = 512  # of every release


class FlashI2VPipeline(DiffusionPipeline, LoraMixin, SingleFileMixin, PreviewMixin, SpeedMixin):
    """Samples videos that start with an image and follow a prompt.

    Args:
        tokenizer: of the text encoder.
        text_encoder: UMT5, or T5. Both may be None where every call gives `prompt_embeds`.
        vae: Wan2.1's. Without it and the transformer there is `encode_prompt` alone.
        transformer: the velocity network.
        scheduler: flow-matching; its `shift` is 7 in the released model.
        use_attention_mask: hide padding from the text encoder's own attention, as Wan2.1 does.
        defaults: what the model was trained for, by the names of `flashi2v_model.config.Defaults`; calls start from it.

    Raises:
        InputError: the transformer is not one of FlashI2V, or the defaults are malformed.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["tokenizer", "text_encoder", "transformer", "vae"]  # noqa: RUF012 (diffusers declares it so)
    _callback_tensor_inputs = ["latents", "denoised", "prompt_embeds", "negative_prompt_embeds"]  # noqa: RUF012

    scheduler: SchedulerMixin

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        text_encoder: UMT5EncoderModel | T5EncoderModel | None,
        vae: AutoencoderKLWan | None,
        transformer: FlashI2VTransformer3DModel | None,
        scheduler: SchedulerMixin,
        use_attention_mask: bool = True,
        defaults: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(transformer, FlashI2VTransformer3DModel | None):
            raise InputError(
                f"the transformer is a {type(transformer).__name__}, which no first frame can guide: "
                "give a FlashI2VTransformer3DModel"
            )
        if vae is not None:
            route_conv3d(vae, skips_zeros=True)
        self.defaults = checked(defaults, "model_index.json")
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
        )
        self.register_to_config(use_attention_mask=use_attention_mask, defaults=defaults)
        if transformer is not None:
            # A saved pipeline names FlashI2V's own class, whatever variant this is: no file names a class to be
            # imported.
            network = FlashI2VTransformer3DModel
            self.register_to_config(transformer=(network.__module__, network.__name__))
        self.video_processor = VideoProcessor(vae_scale_factor=SPATIAL_STRIDE)
        self.execution = Execution()
        self._interrupt, self._guidance_scale, self._num_timesteps = False, 1.0, 0
        self._current_timestep: Tensor | None = None
        self._attention_kwargs: dict[str, Any] | None = None
        self._remarked = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load a directory in diffusers' layout or a model of the hub; no code of it is run, nor found by its names.

        Args:
            pretrained_model_name_or_path: the directory or hub id; "demo" is the model that comes with the package.
            kwargs: as of `diffusers.DiffusionPipeline.from_pretrained`.

        Raises:
            InputError: the directory names other classes than those of this pipeline.
        """
        path = str(directory_of(os.fspath(pretrained_model_name_or_path)))
        if not os.path.isdir(path):
            path = cls.download(path, **kwargs)
        check_model_index(Path(path), cls.__name__)
        return super().from_pretrained(path, **kwargs)

    @property
    def guidance_scale(self) -> float:
        """Weight of the prompt in this run: a callback may set `pipe._guidance_scale`."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether there is a branch with the negative prompt."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Steps of this run, as the scheduler counts them."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> Tensor | None:
        """The timestep that is computed, as caches of diffusers ask; None outside of a run."""
        return self._current_timestep

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        """What this run hands on to the transformer."""
        return self._attention_kwargs

    @property
    def interrupt(self) -> bool:
        """Whether sampling stops after this step: a callback may set `pipe._interrupt`."""
        return self._interrupt

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write a directory in diffusers' layout, with a model card, and the map of previews beside the VAE.

        Args:
            save_directory: where to; a README.md that is there stays.
            args: as of `diffusers.DiffusionPipeline.save_pretrained`.
            push_to_hub: upload it to the hub, too; `repo_id` and the like are `kwargs`.
            kwargs: as of `diffusers.DiffusionPipeline.save_pretrained`.
        """
        directory, to = Path(save_directory), hub_options(kwargs)
        super().save_pretrained(directory, *args, **kwargs)
        repository = str(to.get("repo_id") or directory.name)
        write_beside(self, directory, repository if push_to_hub else directory.name)
        if push_to_hub:
            upload(self, directory, repository, **{name: value for name, value in to.items() if name != "repo_id"})

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> None:
        """Upload the pipeline, with its model card, to the hub.

        Args:
            repo_id: owner/name.
            kwargs: as of `diffusers.DiffusionPipeline.push_to_hub`.
        """
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory, push_to_hub=True, repo_id=repo_id, **kwargs)

    def enable_vae_tiling(self) -> None:
        """Decode in overlapping tiles. The first frame is encoded whole, as it guides the whole video."""
        self.execution = replace(self.execution, vae_tiling=True)

    def disable_vae_tiling(self) -> None:
        """Decode in tiles only where the free memory requires it."""
        self.execution = replace(self.execution, vae_tiling=None)

    def enable_vae_slicing(self) -> None:
        """Decode the videos of a batch one after the other."""
        self.execution = replace(self.execution, vae_slicing=True)

    def disable_vae_slicing(self) -> None:
        """Decode the videos of a batch one after the other only where the free memory requires it."""
        self.execution = replace(self.execution, vae_slicing=None)

    @torch.no_grad()
    def __call__(
        self,
        image: Picture | Sequence[Picture],
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        low_freq_energy_ratio: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: OutputType = "pil",
        max_sequence_length: int | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        cfg_batch: bool | None = None,
        return_dict: bool = True,
        callback_on_step_end: StepCallback | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        conditioning: Mapping[str, Conditioning] | None = None,
        plan: SamplingPlan | str | float | None = None,
    ) -> FlashI2VPipelineOutput | tuple[AnyFrames]:
        """Sample videos for every prompt. Numbers that are None are the model's defaults.

        Args:
            image: the first frame, any size: resized to cover height and width, then cropped in the middle. PIL, an
                array (height, width, 3), a tensor (3, height, width), numbers uint8 or floats in [0, 1], or a file's
                path; one for all prompts, or a list of one for each.
            prompt: what happens; one or a list. None where `prompt_embeds` says it.
            negative_prompt: what should not; one for all prompts or one for each. None is the empty prompt.
            num_frames: T, 4k + 1.
            height: in pixels, divisible by 16.
            width: in pixels, divisible by 16.
            num_inference_steps: of the sampler.
            guidance_scale: weight of the prompt; up to 1 there is no negative prompt and half the work.
            low_freq_energy_ratio: in [0, 1], where the frequencies of the first frame that guide the video start.
            num_videos_per_prompt: n; B is n times the number of prompts, those of one prompt side by side.
            generator: of the noise; a list of one for each video makes a batch equal to its videos one by one.
            latents: (B, C, F, H, W), standard normal noise to start from, instead of drawing it.
            prompt_embeds: (prompts, L, text_dim), from `encode_prompt`, instead of `prompt`.
            negative_prompt_embeds: likewise, instead of `negative_prompt`.
            output_type: see `FlashI2VPipelineOutput`.
            max_sequence_length: L, text tokens that the transformer attends to, padding included; it should be the
                number that it was trained with. None: the transformer config's `text_len`.
            attention_kwargs: as of the transformer: {"scale": weight of the adapters}.
            cfg_batch: run both branches of guidance as one batch: a little faster where memory allows it. None: as
                `execution` says.
            return_dict: return a `FlashI2VPipelineOutput` instead of a tuple.
            callback_on_step_end: called as `callback(pipe, step, timestep, tensors)` after every step; what the dict
                that it returns holds takes the place of what there was; None leaves all as it is. It may set
                `pipe._guidance_scale`, and ends the run by `pipe._interrupt = True`. Callbacks of diffusers fit.
            callback_on_step_end_tensor_inputs: what it is given, of "latents", "denoised" (where they lead, as far as
                this step can tell: to be looked at alone), "prompt_embeds" (B, L, text_dim) and
                "negative_prompt_embeds".
            conditioning: what a variant of the transformer asks for, by name: a number or a list of them for all
                videos, or a tensor with a row for each, (B,) or (B, n).
            plan: which calls of the network are left out: "balanced", "fast", so many times fewer calls (2.5), or a
                `SamplingPlan`, where the model is calibrated. None, or "exact", is the plain loop.

        Raises:
            InputError: an argument cannot be used; the message says what can.
            FloatingPointError: sampling ended in NaN or infinity.
        """
        settings = self._settings(
            num_frames=num_frames,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            low_freq_energy_ratio=low_freq_energy_ratio,
            max_sequence_length=max_sequence_length,
        )
        chosen = plan_of(plan)
        self._check_plan(chosen)
        if output_type not in get_args(OutputType):
            raise InputError(f"output_type must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}")
        if num_videos_per_prompt < 1:
            raise InputError(f"num_videos_per_prompt must be at least 1, got {num_videos_per_prompt}")
        names = self._checked_names(callback_on_step_end, callback_on_step_end_tensor_inputs)
        num_prompts = num_prompts_of(prompt, prompt_embeds)
        pictures = pictures_of(image, num_prompts)
        negatives = negatives_of(negative_prompt, negative_prompt_embeds, num_prompts)
        if not settings.uses_negative_prompt and (negative_prompt_embeds is not None or any(negatives)):
            logger.warning("the negative prompt has no effect with guidance_scale %g", settings.guidance_scale)
        check_conditioning(self.transformer, conditioning or {})
        num_videos, device = num_prompts * num_videos_per_prompt, self._execution_device
        noise = self._noise(num_videos, settings, generator, latents)
        self._interrupt, self._guidance_scale = False, settings.guidance_scale
        self._attention_kwargs = attention_kwargs
        texts = self._texts(prompt, prompt_embeds, negatives, num_videos_per_prompt, max_sequence_length)
        self.scheduler = fitted(self.scheduler)
        set_timesteps(self.scheduler, settings.num_inference_steps, device)
        self._num_timesteps = len(self.scheduler.timesteps)
        calls = self._calls(chosen, settings)
        field = VelocityField(
            self.transformer,
            self._condition(pictures, settings, num_videos),
            *texts,
            settings.guidance_scale,
            settings.low_freq_energy_ratio,
            cfg_batch=self.execution.cfg_batch if cfg_batch is None else cfg_batch,
            conditioning=conditioning_tensors(conditioning or {}, num_videos, device),
            attention_kwargs=attention_kwargs,
            calls=calls,
        )
        try:
            denoised = field.follow(
                self.scheduler,
                noise,
                generator=generator,
                progress=self._steps,
                on_step=partial(self._on_step, field, callback_on_step_end, names),
            )
        finally:
            self._current_timestep = None
        output = self._decoded(denoised, output_type)
        output.calls = None if calls is None else as_record(calls, field.made)
        self.maybe_free_model_hooks()  # with offloading by diffusers, the last part leaves the device too
        return output if return_dict else (output.frames,)

    def _texts(
        self,
        prompt: str | list[str] | None,
        prompt_embeds: Tensor | None,
        negatives: list[str] | Tensor,
        num_videos_per_prompt: int,
        max_sequence_length: int | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what the network sees of the prompts, and of the negative ones where they guide: (B, L, text_dim)."""
        text, negative_text = self.encode_prompt(
            prompt,
            negatives if isinstance(negatives, list) else None,
            self.do_classifier_free_guidance,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=None if isinstance(negatives, list) else negatives,
            max_sequence_length=max_sequence_length,
        )
        if num_videos_per_prompt > 1:
            text = text.repeat_interleave(num_videos_per_prompt, 0)
            if negative_text is not None:
                negative_text = negative_text.repeat_interleave(num_videos_per_prompt, 0)
        return text, negative_text

    def _settings(self, **given: Any) -> SamplingSettings:
        """Return the numbers of a run, with the model's defaults; say once that another size is asked for."""
        missing = [part for part in ("transformer", "vae", "scheduler") if getattr(self, part) is None]
        if missing:
            raise InputError(f"there is no {' and no '.join(missing)}: this pipeline can encode_prompt alone")
        settings = settings_of(self.defaults, **given)
        if not self._remarked and (words := remark(self.defaults, settings)):
            self._remarked = True
            logger.warning(words)
        return settings

    def _checked_names(self, callback: object, names: Sequence[str]) -> Sequence[str]:
        if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
            names = callback.tensor_inputs
        if callback is not None and (unknown := {*names} - {*self._callback_tensor_inputs}):
            known = ", ".join(self._callback_tensor_inputs)
            raise InputError(f"callback_on_step_end_tensor_inputs: there are {known}, not {', '.join(sorted(unknown))}")
        return names

    def _condition(self, pictures: Sequence[Picture], settings: SamplingSettings, num_videos: int) -> Tensor:
        """Encode the first frames, each once: (B, C, 1, H, W)."""
        first = torch.stack([prepare_image(picture, settings.height, settings.width) for picture in pictures])
        condition = encode_video(self.vae, first.to(self._execution_device))  # (pictures, C, 1, H, W)
        return condition.repeat_interleave(num_videos // len(pictures), 0)

    def _steps(self, timesteps: Iterable[Tensor]) -> Iterator[Tensor]:
        for timestep in self.progress_bar(timesteps):
            self._current_timestep = timestep
            yield timestep

    def _on_step(
        self,
        field: VelocityField,
        callback: StepCallback | None,
        names: Sequence[str],
        step: int,
        timestep: Tensor,
        y: Tensor,
    ) -> Tensor | None:
        """Return the state to go on with; None ends the run."""
        if callback is not None:
            tensors = {"latents": y, "prompt_embeds": field.text, "negative_prompt_embeds": field.negative_text}
            shown = field.denoised if "denoised" in names else None
            given = {**tensors, "denoised": shown}
            changed = callback(self, step, timestep, {name: given[name] for name in names})
            changed = {name: tensor for name, tensor in (changed or {}).items() if tensor is not shown}
            if unknown := ", ".join(sorted({*changed} - {*tensors})):
                raise InputError(f"callback_on_step_end changed {unknown}: it may change {', '.join(tensors)}")
            for name, tensor in changed.items():
                before = tensors[name]
                if before is not None and (tensor is None or tensor.shape != before.shape):
                    shape = None if tensor is None else tuple(tensor.shape)
                    raise InputError(f"callback_on_step_end: {name} must stay {tuple(before.shape)}, got {shape}")
            y = changed.get("latents", y)
            field.text = changed.get("prompt_embeds", field.text)
            field.negative_text = changed.get("negative_prompt_embeds", field.negative_text)
            field.guidance_scale = self._guidance_scale
            if field.guidance_scale > 1 and field.negative_text is None:
                raise InputError("callback_on_step_end: guidance_scale may rise above 1 only where it began above 1")
        return None if self._interrupt else y

    def _decoded(self, latents: Tensor, output_type: OutputType) -> FlashI2VPipelineOutput:
        fps = fps_of(self.defaults)
        if output_type == "latent":
            return FlashI2VPipelineOutput(frames=latents, fps=fps)
        video, decoding = decode_within_memory(self.vae, latents, self.execution)
        frames = self.video_processor.postprocess_video(video, output_type)
        return FlashI2VPipelineOutput(frames=frames, decoding=decoding, fps=fps)

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str] | None = None,
        do_classifier_free_guidance: bool = True,
        num_videos_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        max_sequence_length: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the text encoder's states, padding zeroed: of prompts, and of negative prompts; (B, L, text_dim) each.

        Args:
            prompt: one or a list.
            negative_prompt: one for all prompts or one for each; None is the empty prompt.
            do_classifier_free_guidance: otherwise there are no negative prompts, and None is returned for them.
            num_videos_per_prompt: how often each prompt's states are repeated.
            prompt_embeds: returned in place of what `prompt` would give.
            negative_prompt_embeds: likewise.
            max_sequence_length: L; longer prompts are cut, with a warning. None: the transformer config's `text_len`.
            device: where to; None: the pipeline's.
            dtype: of the states; None: the text encoder's.

        Raises:
            InputError: there is no text encoder, or a prompt is no string.
        """
        device = device or self._execution_device
        num_prompts = num_prompts_of(prompt, prompt_embeds)
        if prompt_embeds is None:
            assert prompt is not None
            prompt_embeds = self._encode(texts_of(prompt, "prompt"), max_sequence_length, dtype)
            prompt_embeds = prompt_embeds.repeat_interleave(num_videos_per_prompt, 0)
        if not do_classifier_free_guidance:
            negative_prompt_embeds = None
        elif negative_prompt_embeds is None:
            negatives = negatives_of(negative_prompt, None, num_prompts)
            assert isinstance(negatives, list)
            negative_prompt_embeds = self._encode(negatives, max_sequence_length, dtype)
            negative_prompt_embeds = negative_prompt_embeds.repeat_interleave(num_videos_per_prompt, 0)
        prompt_embeds = prompt_embeds.to(device)
        negative_prompt_embeds = None if negative_prompt_embeds is None else negative_prompt_embeds.to(device)
        return prompt_embeds, negative_prompt_embeds

    def _encode(self, prompts: list[str], max_sequence_length: int | None, dtype: torch.dtype | None) -> Tensor:
        """Return states, (B, L, text_dim); each distinct prompt is encoded once."""
        if self.text_encoder is None or self.tokenizer is None:
            raise InputError("there is no text encoder: give prompt_embeds and negative_prompt_embeds")
        prompts = [tidy(prompt) for prompt in prompts]
        distinct = list(dict.fromkeys(prompts))
        usual = _USUAL_TEXT_LENGTH if self.transformer is None else self.transformer.config.text_len
        length = max_sequence_length or usual
        tokens = self.tokenizer(distinct, max_length=length, padding="max_length", truncation=True, return_tensors="pt")
        for prompt, full in zip(distinct, tokens.attention_mask.bool().all(1).tolist()):
            # Only a full row may have been cut.
            if full and (whole := len(self.tokenizer(prompt).input_ids)) > length:
                logger.warning(
                    "a prompt has %d tokens, of which the first %d are read: %.60s...", whole, length, prompt
                )
        ids, mask = tokens.input_ids.to(self._execution_device), tokens.attention_mask
        states = encode_text(self.text_encoder, ids, mask, use_mask=self.config.use_attention_mask)
        return states[[distinct.index(prompt) for prompt in prompts]].to(dtype or states.dtype)

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


# diffusers looks for the classes that a directory names among its own.
for _own in (FlashI2VPipeline, FlashI2VTransformer3DModel):
    setattr(diffusers, _own.__name__, _own)
diffusers.pipelines.FlashI2VPipeline = FlashI2VPipeline

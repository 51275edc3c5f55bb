"""What a run will take, before anything is loaded: peak memory, operations, parameters, calls.

B videos, T video frames, F latent frames, H W latent grid, N tokens, L text tokens.

Nothing is estimated by formulas of our own: the functions that sampling calls run on the meta device's tensors, which
have no numbers, and `flashi2v_model.cost` counts.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial

import torch
from torch import Tensor, nn

from flashi2v_infer.arguments import check_conditioning
from flashi2v_infer.decoding import choose_decoding, decoding_as, describe
from flashi2v_infer.execution import Execution
from flashi2v_infer.load import find_device
from flashi2v_infer.placement import streams
from flashi2v_infer.plan.skeleton import Parts
from flashi2v_infer.settings import SamplingSettings
from flashi2v_model import FlashI2VTransformer3DModel
from flashi2v_model.caching import conditions_kept
from flashi2v_model.config import SchedulerName
from flashi2v_model.cost import held_while_running, num_bytes, tracing
from flashi2v_model.encoders import TextEncoder, decode_video, encode_text, encode_video
from flashi2v_model.sampling import VelocityField, exact_timesteps, set_timesteps
from flashi2v_model.scheduler import make_scheduler
from flashi2v_model.speed.choice import Calls
from flashi2v_model.speed.plan import HIGHEST_ORDER
from flashi2v_npu_ops.device import free_memory, missing


@dataclass(frozen=True)
class Stage:
    """One part of a run.

    Attributes:
        name: of the stage.
        peak: bytes on the device at once: weights, inputs, and what the computation makes.
        weights: bytes of weights that lie on the device throughout the stage; offloaded ones come on top, in `peak`.
        flops: floating-point operations of the whole stage.
        last_flops: of its last part: in denoising a step, and all steps but the first are alike.
    """

    name: str
    peak: int
    weights: int
    flops: int
    last_flops: int


@dataclass(frozen=True)
class Plan:
    """What a run will take; `str` makes a table of it.

    Attributes:
        stages: in the order in which they run.
        step_flops: floating-point operations of one step after the first, both branches of the guidance.
        num_steps: evaluations of the sampler.
        calls_per_step: of the network.
        num_tokens: N, of one video.
        num_videos: B.
        parameters: of each part.
        decoding: in which way the VAE decodes.
        notes: what was assumed.
        num_calls: of the network, one branch each, where some are left out.
    """

    stages: tuple[Stage, ...]
    step_flops: int
    num_steps: int
    calls_per_step: int
    num_tokens: int
    num_videos: int
    parameters: dict[str, int]
    decoding: str
    notes: tuple[str, ...] = field(default=())
    num_calls: int | None = None

    @property
    def peak(self) -> int:
        """Bytes on the device at once, over all stages."""
        return max(stage.peak for stage in self.stages)

    def __str__(self) -> str:
        lines = ["| stage | peak memory | of it weights | operations |", "|---|---|---|---|"]
        lines += [
            f"| {stage.name} | {gib(stage.peak)} | {gib(stage.weights)} | {tera(stage.flops)} |"
            for stage in self.stages
        ]
        calls = self.num_steps * self.calls_per_step
        sizes = ", ".join(
            f"{name} {count / 1e9:.2f} billion" if count >= 1e7 else f"{name} {count / 1e6:.2f} million"
            for name, count in self.parameters.items()
        )
        lines += [
            "",
            f"peak memory {gib(self.peak)}, operations per step {tera(self.step_flops)}",
            f"{self.num_steps} steps, {self.calls_per_step} calls of the network in each, {calls} in all"
            f"{'' if self.num_calls is None else f', of which {self.num_calls} are made'}; "
            f"{self.num_tokens} tokens a video, {self.num_videos} at a time",
            f"parameters: {sizes}",
            f"decoding in {self.decoding}",
            *(f"note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def tera(flops: float) -> str:
    return f"{flops / 1e12:.1f} TFLOP" if flops >= 1e11 else f"{flops / 1e9:.1f} GFLOP"


def target_device(name: str) -> tuple[str, int | None]:
    """Return the type of the device of this name, which need not be in this machine, and its free bytes.

    Raises:
        InputError: there is no such type of device.
    """
    device_type = name.partition(":")[0]
    if device_type in ("cuda", "npu") and missing(device_type) is not None:
        return device_type, None
    device = find_device(name)
    return device.type, free_memory(device)


def make_plan(
    parts: Parts,
    settings: SamplingSettings,
    execution: Execution,
    device_type: str,
    free: int | None,
    num_videos: int = 1,
    scheduler: SchedulerName = "euler",
    calls: Calls | None = None,
) -> Plan:
    """Predict what a run takes.

    Operators' own workspace, an allocator's gaps, libraries and drivers come on top of the memory: on GPUs count on
    about a GiB. The prompts are encoded ahead and the text encoder put away, as `flashi2v_infer.placement` does it.

    Args:
        parts: from `flashi2v_infer.plan.skeleton`.
        settings: the numbers of the run.
        execution: how it computes.
        device_type: where.
        free: bytes that are free there now; None, where this is not known, lets the VAE decode whole.
        num_videos: B, sampled at once.
        scheduler: the sampler; heun evaluates the network twice for each of `num_inference_steps` but the last.
        calls: that are made, where some are left out.
    """
    run = _Run(parts, settings, execution, num_videos)
    model = _Residence(parts, execution, streams(device_type))
    sampler = make_scheduler(scheduler, shift=1.0)
    set_timesteps(sampler, settings.num_inference_steps, torch.device("cpu"))
    timesteps = exact_timesteps(sampler).to(run.latents.device)
    branches = 2 if settings.uses_negative_prompt else 1
    encoding = model.stage("text encoding", [run.encode_text], [], repeats=branches)
    image = model.stage("image encoding", [run.encode_image], run.texts)
    # What the first step keeps for the others is alive in them.
    steps = [partial(run.step, timestep) for timestep in timesteps[:2]]
    whole = branches * len(timesteps)
    num_calls = whole if calls is None else calls.num_calls
    # A velocity of each part is kept for every order of what stands in.
    kept = [run.latents.clone() for _ in range((HIGHEST_ORDER + 1) * branches if num_calls < whole else 0)]
    with conditions_kept(parts.transformer):
        denoising = model.stage("denoising", steps, [*run.held, *kept], repeats=Fraction(num_calls, branches))
    room = None if free is None else free - model.weights("decoding")
    decoding = choose_decoding(parts.vae, tuple(run.latents.shape), execution, room)
    with decoding_as(parts.vae, decoding):
        decoded = model.stage("decoding", [run.decode], run.held)
    return Plan(
        (encoding, image, denoising, decoded),
        step_flops=denoising.last_flops,
        num_steps=len(timesteps),
        calls_per_step=1 if execution.cfg_batch or execution.guidance_parallel_size > 1 else branches,
        num_calls=None if num_calls == whole else num_calls,
        num_tokens=math.prod(parts.transformer.token_grid(run.latents.shape)),
        num_videos=num_videos,
        parameters={name: sum(p.numel() for p in module.parameters()) for name, module in parts.modules.items()},
        decoding=describe(decoding),
        notes=(*parts.assumptions, *_notes(execution)),
    )


class _Run:
    """What sampling computes, on the device of the parts: meta, but the same functions measure real modules."""

    def __init__(self, parts: Parts, settings: SamplingSettings, execution: Execution, num_videos: int) -> None:
        config, self._device = parts.transformer.config, parts.vae.device
        self._parts, self._settings, self._num_videos = parts, settings, num_videos
        self._num_text_tokens = settings.max_sequence_length or config.text_len
        self.latents = self._zeros(num_videos, config.in_channels, *settings.latent_grid)
        condition = self.latents[:, :, :1].clone()
        text_shape = (num_videos, self._num_text_tokens, config.text_dim)
        self.texts = [
            self._zeros(*text_shape, dtype=parts.text_encoder.dtype)
            for _ in range(2 if settings.uses_negative_prompt else 1)
        ]
        self.held = [self.latents, condition, *self.texts]
        check_conditioning(parts.transformer, settings.conditioning)
        self._velocity = VelocityField(
            parts.transformer,
            condition,
            self.texts[0],
            self.texts[1] if settings.uses_negative_prompt else None,
            settings.guidance_scale,
            settings.low_freq_energy_ratio,
            cfg_batch=execution.cfg_batch,
            conditioning={
                name: self._zeros(num_videos, *torch.tensor(value).shape)
                for name, value in settings.conditioning.items()
            },
        )

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self._device)

    def encode_text(self) -> Tensor:
        ids = self._zeros(1, self._num_text_tokens, dtype=torch.long)
        return encode_text(self._parts.text_encoder, ids, torch.ones_like(ids), use_mask=False)

    def encode_image(self) -> Tensor:
        frames = self._zeros(self._num_videos, 3, 1, self._settings.height, self._settings.width)
        return encode_video(self._parts.vae, frames)

    def step(self, timestep: Tensor) -> Tensor:
        return self.latents + self._velocity(self.latents, timestep)

    def decode(self) -> Tensor:
        return decode_video(self._parts.vae, self.latents)


def _notes(execution: Execution) -> Iterator[str]:
    if execution.compile:
        yield "compiled blocks need less memory than this"
    if (size := execution.processes_per_video) > 1:
        yield f"this is what a process alone takes: in denoising each of {size} has less to do"


def group_sizes(
    transformer: FlashI2VTransformer3DModel, text_encoder: TextEncoder, streaming: bool
) -> dict[nn.Module, int]:
    """Return the bytes that offloading in groups holds on the device while each of these modules runs.

    Args:
        transformer: a block at a time; what is in no block, throughout.
        text_encoder: a leaf at a time.
        streaming: a block more is fetched ahead.
    """
    blocks = [*transformer.fourier_embedding, *transformer.blocks]
    ahead = max(map(num_bytes, blocks)) if streaming else 0
    sizes = {module: num_bytes(module) for module in text_encoder.modules() if [*module.parameters(recurse=False)]}
    sizes |= {block: num_bytes(block) + ahead for block in blocks}
    sizes[transformer] = num_bytes(transformer) - num_bytes(*blocks)
    return sizes


class _Residence:
    """Which weights are on the device when: what `flashi2v_infer.placement` brings about, in bytes.

    Whole parts stay through a stage; what offloading in groups brings and takes is counted while modules run.
    """

    def __init__(self, parts: Parts, execution: Execution, streaming: bool) -> None:
        self._parts, self._offload = parts, execution.offloading
        self._moving = group_sizes(parts.transformer, parts.text_encoder, streaming) if self._offload == "group" else {}

    def weights(self, name: str) -> int:
        """Return the bytes that stay on the device throughout a stage."""
        transformer, text_encoder, vae = self._parts.modules.values()
        shift = self._parts.transformer.learnable_proj
        staying: dict[str, dict[str, tuple[nn.Module, ...]]] = {
            "none": {
                "text encoding": (transformer, text_encoder, vae),  # then it is put away
                "image encoding": (transformer, vae),
                "denoising": (transformer, vae),
                "decoding": (transformer, vae),
            },
            "model": {
                "text encoding": (text_encoder,),
                "image encoding": (vae, shift),
                "denoising": (transformer, vae),  # the VAE leaves for the text encoder only
                "decoding": (vae,),
            },
            "group": {
                "text encoding": (vae,),
                "image encoding": (vae, shift),
                "denoising": (vae,),
                "decoding": (vae,),
            },
        }
        return num_bytes(*staying[self._offload][name])

    def stage(
        self, name: str, runs: Sequence[Callable[[], Tensor]], held: list[Tensor], repeats: int | Fraction = 1
    ) -> Stage:
        """Trace a stage with these weights, and inputs that were made before.

        Args:
            name: of the stage.
            runs: what is called, once each.
            held: the inputs.
            repeats: how often runs take place in all, the further ones like the last.
        """
        weights = self.weights(name)
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in held}
        flops = [0]
        with tracing() as trace:
            trace.hold(weights + sum(storages.values()))
            with held_while_running(trace, self._moving):
                for run in runs:
                    run()
                    flops.append(trace.flops)
        last = flops[-1] - flops[-2]
        return Stage(name, trace.peak, weights, int(trace.flops + (repeats - len(runs)) * last), last)

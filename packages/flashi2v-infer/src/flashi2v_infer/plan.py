"""What a run will take, before anything is loaded: peak memory, operations, parameters, calls.

B videos, T video frames, F latent frames, H W latent grid, N tokens, L text tokens.

The modules are built on the meta device from their config.json, and the functions that sampling calls run on tensors
without numbers, counted by `flashi2v_infer.tracing`.
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from flashi2v_data.errors import InputError
from flashi2v_infer.config import InferenceConfig
from flashi2v_infer.decoding import choose_decoding, decoding_as
from flashi2v_infer.execution import Execution
from flashi2v_infer.load import cast, check_model, find_device, settled_parts
from flashi2v_infer.placement import streams
from flashi2v_infer.settings import SamplingSettings
from flashi2v_infer.tracing import Trace, held_while_running, num_bytes, tracing
from flashi2v_model import FlashI2VTransformer3DModel, Guidance, guide
from flashi2v_model.config import DType
from flashi2v_model.encoders import (
    DTYPES,
    SPATIAL_STRIDE,
    TEMPORAL_STRIDE,
    configure_tiling,
    decode_video,
    encode_text,
    encode_video,
)
from flashi2v_model.presets import TRANSFORMERS
from flashi2v_npu_ops.device import free_memory, missing

# Of the encoders that every release uses, for where their config.json is not at hand.
_UMT5_XXL = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": False,
    "use_cache": False,
}
_META = torch.device("meta")


@dataclass(frozen=True)
class Parts:
    """The modules of a pipeline without numbers, in their dtypes, and what had to be assumed of them."""

    transformer: FlashI2VTransformer3DModel
    text_encoder: UMT5EncoderModel
    vae: AutoencoderKLWan
    assumptions: tuple[str, ...] = ()

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The parts by name."""
        return {"transformer": self.transformer, "text encoder": self.text_encoder, "VAE": self.vae}


def parts_of_config(config: InferenceConfig, execution: Execution) -> Parts:
    """Build the parts that a configuration file describes; only config.json files are read.

    Raises:
        InputError: a config.json is damaged.
    """
    predictor, encoder, ae = settled_parts(config, execution)
    parts = _parts(
        predictor.transformer_arguments(),
        _read_config(Path(encoder.from_pretrained), "text_encoder.from_pretrained"),
        _read_config(Path(ae.from_pretrained), "ae.from_pretrained"),
        (predictor.dtype, encoder.dtype, ae.dtype),
    )
    configure_tiling(parts.vae, ae)
    return parts


def parts_of_model(model: str, execution: Execution, device_type: str) -> Parts:
    """Build the parts of a pipeline directory, or, unseen, of a hub id; only config.json files are read.

    Args:
        model: what `flashi2v_infer.load.load_from_pretrained` takes.
        execution: for the dtypes.
        device_type: where it is going to run.

    Raises:
        InputError: there is no such directory, or a config.json is damaged.
    """
    path = check_model(model)
    read = {name: path and _read_config(path / name, "--model") for name in ("transformer", "text_encoder", "vae")}
    dtype = execution.settled_dtype(device_type)
    dtypes = (dtype, dtype, execution.settled_vae_dtype())
    return _parts(read["transformer"], read["text_encoder"], read["vae"], dtypes)


def _read_config(directory: Path, key: str) -> dict[str, Any] | None:
    path = directory / "config.json"
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise InputError(f"{key}: {path} is damaged: {error}") from error


def _parts(
    transformer: dict[str, Any] | None,
    text_encoder: dict[str, Any] | None,
    vae: dict[str, Any] | None,
    dtypes: tuple[DType, DType, DType],
) -> Parts:
    found = {"transformer": transformer, "text encoder": text_encoder, "VAE": vae}
    standard = {"transformer": "FlashI2V 1.3B's", "text encoder": "UMT5-XXL's", "VAE": "Wan2.1's"}
    assumptions = tuple(
        f"the {part}'s sizes are taken to be {standard[part]}: its config.json is not on this disk"
        for part, config in found.items()
        if config is None
    )
    with _META:
        parts = Parts(
            FlashI2VTransformer3DModel.from_config(transformer or TRANSFORMERS["1.3b"]),
            UMT5EncoderModel(UMT5Config(**(text_encoder or _UMT5_XXL))),
            AutoencoderKLWan.from_config(vae or {}),
            assumptions,
        )
    for module in parts.modules.values():
        module.requires_grad_(False).eval()
    cast(parts.transformer, DTYPES[dtypes[0]])
    for module, dtype in ((parts.text_encoder, dtypes[1]), (parts.vae, dtypes[2])):
        for parameter in module.parameters():
            parameter.data = parameter.data.to(DTYPES[dtype])
    return parts


@dataclass(frozen=True)
class Stage:
    """One part of a run.

    Attributes:
        name: of the stage.
        peak: bytes on the device at once: weights, inputs, and what the computation makes.
        weights: bytes of weights that lie on the device throughout the stage; offloaded ones come on top, in `peak`.
        flops: floating-point operations, of all calls.
    """

    name: str
    peak: int
    weights: int
    flops: int


@dataclass(frozen=True)
class Plan:
    """What a run will take; `str` makes a table of it.

    Attributes:
        stages: in the order in which they run.
        step_flops: floating-point operations of one step, both branches of the guidance.
        num_steps: of the sampler.
        calls_per_step: of the network.
        num_tokens: N, of one video.
        num_videos: B.
        parameters: of each part.
        decoding: in which way the VAE decodes.
        notes: what was assumed.
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

    @property
    def peak(self) -> int:
        """Bytes on the device at once, over all stages."""
        return max(stage.peak for stage in self.stages)

    def __str__(self) -> str:
        lines = ["| stage | peak memory | of it weights | operations |", "|---|---|---|---|"]
        lines += [
            f"| {stage.name} | {_gib(stage.peak)} | {_gib(stage.weights)} | {_tera(stage.flops)} |"
            for stage in self.stages
        ]
        calls = self.num_steps * self.calls_per_step
        sizes = ", ".join(f"{name} {count / 1e9:.2f} billion" for name, count in self.parameters.items())
        lines += [
            "",
            f"peak memory {_gib(self.peak)}, operations per step {_tera(self.step_flops)}",
            f"{self.num_steps} steps, {self.calls_per_step} calls of the network in each, {calls} in all; "
            f"{self.num_tokens} tokens a video, {self.num_videos} at a time",
            f"parameters: {sizes}",
            f"decoding in {self.decoding}",
            *(f"note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _tera(flops: int) -> str:
    return f"{flops / 1e12:.1f} TFLOP"


def target_device(execution: Execution, file: str = "auto") -> tuple[str, int | None]:
    """Return the type of the device that a run would use, which need not be in this machine, and its free bytes.

    Args:
        execution: its `device` comes first.
        file: what a configuration file says.

    Raises:
        InputError: the execution makes no sense on such a device.
    """
    name = execution.device or file
    device_type = name.partition(":")[0]
    if device_type == "auto" or missing(device_type) is None:
        device = find_device(name)
        execution.check_device(device.type)
        return device.type, free_memory(device)
    if device_type not in ("cuda", "npu"):
        find_device(name)  # raises: there is no such type
    return device_type, None


def make_plan(
    parts: Parts,
    settings: SamplingSettings,
    execution: Execution,
    device_type: str,
    free: int | None,
    num_videos: int = 1,
) -> Plan:
    """Predict what a run takes.

    Operators' own workspace, an allocator's gaps, libraries and drivers come on top of the memory: on GPUs count on
    about a GiB. The operations of the network are those of a step's plain calls.

    Args:
        parts: from `parts_of_config` or `parts_of_model`.
        settings: the numbers of the run.
        execution: how it computes.
        device_type: where.
        free: bytes that are free there now; None, where this is not known, lets the VAE decode whole.
        num_videos: B, sampled at once.
    """
    grid = (
        (settings.num_frames - 1) // TEMPORAL_STRIDE + 1,
        settings.height // SPATIAL_STRIDE,
        settings.width // SPATIAL_STRIDE,
    )
    config = parts.transformer.config
    latents = torch.empty((num_videos, config.in_channels, *grid), device=_META)
    num_text_tokens = settings.max_sequence_length or config.text_len
    branches = 2 if settings.uses_negative_prompt else 1
    calls = 1 if execution.cfg_batch else branches
    model = _Residence(parts, execution, streams(device_type))

    def text_stage() -> Tensor:
        ids = torch.empty((1, num_text_tokens), dtype=torch.long, device=_META)
        return encode_text(parts.text_encoder, ids, torch.ones_like(ids), use_mask=False)

    def image_stage() -> Tensor:
        frames = torch.empty((num_videos, 3, 1, settings.height, settings.width), device=_META)
        condition = encode_video(parts.vae, frames)
        return guide(parts.transformer, condition, grid[0], settings.low_freq_energy_ratio).shift

    with torch.no_grad():
        guidance = guide(parts.transformer, latents[:, :, :1], grid[0], settings.low_freq_energy_ratio)
        text = torch.empty((num_videos, num_text_tokens, config.text_dim), dtype=parts.text_encoder.dtype, device=_META)
    texts = [text, torch.empty_like(text)][:branches]

    def step() -> Tensor:
        if execution.cfg_batch and branches == 2:
            double = Guidance(*(torch.cat([part, part]) for part in (guidance.shift, guidance.fourier)))
            velocities = list(
                call_network(parts.transformer, latents.repeat(2, 1, 1, 1, 1), double, torch.cat(texts)).chunk(2)
            )
        else:
            velocities = [call_network(parts.transformer, latents, guidance, context) for context in texts]
        velocity = velocities[0]
        if branches == 2:
            velocity = velocities[1] + settings.guidance_scale * (velocity - velocities[1])
        return latents + velocity

    room = None if free is None else free - model.weights("decoding")
    decoding = choose_decoding(parts.vae, tuple(latents.shape), execution, room)

    def decode() -> Tensor:
        with decoding_as(parts.vae, decoding):
            return decode_video(parts.vae, latents)

    held = [latents, guidance.shift, guidance.fourier, *texts]
    encoding = model.stage("text encoding", text_stage, [], repeats=branches)
    image = model.stage("image encoding", image_stage, texts)
    one_step = model.stage("denoising", step, held)
    decoded = model.stage("decoding", decode, held)
    patch = config.patch_size
    return Plan(
        (encoding, image, replace(one_step, flops=one_step.flops * settings.num_inference_steps), decoded),
        step_flops=one_step.flops,
        num_steps=settings.num_inference_steps,
        calls_per_step=calls,
        num_tokens=math.prod(size // step for size, step in zip(grid, patch)),
        num_videos=num_videos,
        parameters={name: module.num_parameters() for name, module in parts.modules.items()},
        decoding="the tiles that are set for the VAE" if decoding is None else str(decoding),
        notes=parts.assumptions,
    )


def call_network(transformer: FlashI2VTransformer3DModel, y: Tensor, guidance: Guidance, context: Tensor) -> Tensor:
    """Call the network as the sampling loop does, at one timestep, which has a number."""
    timestep = torch.full((len(y),), 500.0)
    return transformer(y - guidance.shift, timestep, context, guidance.fourier, return_dict=False)[0].float()


class _Residence:
    """Which weights are on the device when: what `flashi2v_infer.placement` brings about, in bytes.

    Whole parts stay through a stage; what offloading in groups brings and takes is counted while modules run.
    """

    def __init__(self, parts: Parts, execution: Execution, streaming: bool) -> None:
        self._parts, self._offload, self._streaming = parts, execution.offloading, streaming

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

    def stage(self, name: str, run: Callable[[], Tensor], held: list[Tensor], repeats: int = 1) -> Stage:
        """Trace a stage with these weights, and inputs that were made before."""
        weights = self.weights(name)
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in held}
        with tracing() as trace:
            trace.hold(weights + sum(storages.values()))
            with self._groups(trace):
                run()
        return Stage(name, trace.peak, weights, trace.flops * repeats)

    @contextmanager
    def _groups(self, trace: Trace) -> Iterator[None]:
        if self._offload != "group":
            yield
            return
        transformer, encoder = self._parts.transformer, self._parts.text_encoder
        blocks = [*transformer.fourier_embedding, *transformer.blocks]
        ahead = max(map(num_bytes, blocks)) if self._streaming else 0
        sizes = {module: num_bytes(module) for module in encoder.modules() if [*module.parameters(recurse=False)]}
        sizes |= {block: num_bytes(block) + ahead for block in blocks}
        sizes[transformer] = num_bytes(transformer) - num_bytes(*blocks)
        with held_while_running(trace, sizes):
            yield

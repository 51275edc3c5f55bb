"""The frozen encoders: Wan's VAE (diffusers) and UMT5 (transformers), with the latent normalisation.

B batch, C latent channels, T video frames, F latent frames, L text tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from transformers import T5EncoderModel, UMT5EncoderModel

from flashi2v_model.config import SPATIAL_STRIDE, TEMPORAL_STRIDE, AEConfig, TextEncoderConfig, check_pretrained
from flashi2v_model.errors import InputError, named
from flashi2v_model.weights.reading import check_directory, read_json
from flashi2v_npu_ops import route_conv3d
from flashi2v_npu_ops.faults import explain_fault

TextEncoder: TypeAlias = UMT5EncoderModel | T5EncoderModel
DTYPES = {"fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_vae(config: AEConfig, device: torch.device) -> AutoencoderKLWan:
    """Load the VAE, frozen.

    Raises:
        InputError: the directory is missing or holds no such model.
    """
    vae = load_pretrained(AutoencoderKLWan, config.from_pretrained, "ae.from_pretrained", DTYPES[config.dtype], device)
    configure_tiling(vae, config)
    route_conv3d(vae, skips_zeros=True)
    return vae.requires_grad_(False).eval()


def configure_tiling(vae: AutoencoderKLWan, config: AEConfig) -> None:
    """Turn on the tiles that a configuration asks for."""
    if not config.enable_tiling:
        return
    (height, width), (stride_height, stride_width) = config.tiling_param.tile_size, config.tiling_param.tile_stride
    vae.enable_tiling(
        tile_sample_min_height=height * SPATIAL_STRIDE,
        tile_sample_min_width=width * SPATIAL_STRIDE,
        tile_sample_stride_height=stride_height * SPATIAL_STRIDE,
        tile_sample_stride_width=stride_width * SPATIAL_STRIDE,
    )


def text_encoder_class(config: Path | Mapping[str, Any]) -> type[TextEncoder]:
    """Return the class of a text encoder, by its directory or config.json: T5 where that says so, else UMT5."""
    if isinstance(config, Path):
        config = read_json(config / "config.json") if (config / "config.json").is_file() else {}
    return T5EncoderModel if config.get("model_type") == "t5" else UMT5EncoderModel


def load_text_encoder(config: TextEncoderConfig, device: torch.device) -> UMT5EncoderModel:
    """Load the text encoder, frozen.

    Raises:
        InputError: the directory is missing or holds no such model.
    """
    encoder = load_pretrained(
        UMT5EncoderModel, config.from_pretrained, "text_encoder.from_pretrained", DTYPES[config.dtype], device
    )
    return encoder.requires_grad_(False).eval()


def load_pretrained(
    cls: Any, path: str, key: str, dtype: torch.dtype, device: torch.device, *, subfolder: str = ""
) -> Any:
    """Call `cls.from_pretrained` on a directory or hub id, with one clear line where that cannot work.

    The weights go straight to the device, with no whole copy of them on the CPU in between. Weights that the model has
    no place for are passed over (a text encoder is often published with its decoder), except by our own transformer.

    Raises:
        InputError: naming `key`, the configuration key or option that gave `path`.
    """
    check_pretrained(path, key)
    if (directory := Path(path, subfolder)).is_dir():
        with named(key):
            check_directory(directory)
            _check_claim(cls, directory)
    # The libraries would fill missing weights with random numbers, so a report is asked for.
    load = partial(cls.from_pretrained, path, subfolder=subfolder, torch_dtype=dtype, output_loading_info=True)
    try:
        try:
            model, report = load(device_map={"": device})
        except NotImplementedError:  # diffusers leaves missing weights without numbers, and cannot move those
            model, report = load()
    except InputError as error:  # of our transformer, which lists all that does not fit
        raise InputError(f"{key}: {error}") from error
    except Exception as error:  # whatever the libraries raise on what they cannot read
        if explain_fault(error):  # the device's, not the file's
            raise
        reason = " ".join(str(error).split())[:300].rstrip(".")
        hub = "" if Path(path).is_dir() else " (there is no such directory here, so it was looked up on the hub)"
        raise InputError(f"{key}: cannot load {cls.__name__} from {path!r}: {reason}{hub}") from error
    problems = {what: sorted(map(str, report[what])) for what in ("missing_keys", "mismatched_keys") if report[what]}
    if problems:
        raise InputError(f"{key}: the weights in {path!r} are not those of {cls.__name__}: {str(problems)[:300]}")
    return model


def _check_claim(cls: Any, directory: Path) -> None:
    """Refuse a config.json that describes a far larger model than the weights beside it are: it would be allocated.

    Raises:
        InputError: it does.
    """
    stored = sum(file.stat().st_size for file in directory.iterdir() if file.suffix in (".safetensors", ".bin"))
    config = directory / "config.json"
    if not stored or not config.is_file():
        return  # loading says so
    values = read_json(config)
    try:
        with torch.device("meta"):
            model = cls.from_config(values) if hasattr(cls, "from_config") else cls(cls.config_class(**values))
    except Exception:  # whatever the libraries raise on what is no configuration; loading says so
        return
    claimed = sum(parameter.numel() for parameter in model.parameters())
    if claimed > 4 * stored:  # of a byte each, or half a one where they are quantised
        raise InputError(f"{config} describes a model of {claimed:,} numbers, its weights have {stored:,} bytes")


def _statistics(vae: AutoencoderKLWan, like: Tensor) -> tuple[Tensor, Tensor]:
    shape = (1, -1, 1, 1, 1)
    return (
        torch.tensor(vae.config.latents_mean, dtype=like.dtype, device=like.device).view(shape),
        torch.tensor(vae.config.latents_std, dtype=like.dtype, device=like.device).view(shape),
    )


def normalise_latents(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Return (latents - mean) / std, per channel, with the VAE config's numbers: (B, C, F, H, W)."""
    mean, std = _statistics(vae, latents)
    return (latents - mean) / std


@dataclass(frozen=True)
class Posterior:
    """What the VAE says of a video's normalised latents: mean and std, (B, C, F, H, W) in fp32."""

    mean: Tensor
    std: Tensor

    def draw(self, noise: Tensor | None) -> Tensor:
        """Return mean + std * noise, or the mode where there is none."""
        return self.mean if noise is None else self.mean + self.std * noise.to(self.mean.device)


def encode_video(vae: AutoencoderKLWan, video: Tensor, noise: Tensor | None = None) -> Tensor:
    """Encode a video to normalised latents.

    Args:
        vae: the encoder.
        video: (B, 3, T, 8H, 8W) in [-1, 1], T = 4 (F - 1) + 1.
        noise: (B, C, F, H, W) standard normal, for a draw from the posterior; None takes its mode.

    Returns:
        (B, C, F, H, W) in fp32.

    Raises:
        ValueError: the video's size does not fit the VAE's strides.
    """
    return video_posterior(vae, video).draw(noise)


def video_posterior(vae: AutoencoderKLWan, video: Tensor) -> Posterior:
    """Encode a video to the posterior of its normalised latents; arguments and errors as of `encode_video`."""
    if video.ndim != 5 or video.shape[2] % TEMPORAL_STRIDE != 1 or any(s % SPATIAL_STRIDE for s in video.shape[3:]):
        raise ValueError(f"video must be (B, 3, 4k + 1, 8H, 8W), got {tuple(video.shape)}")
    posterior = vae.encode(video.to(vae.dtype)).latent_dist
    mean = posterior.mean.float()
    return Posterior(normalise_latents(vae, mean), posterior.std.float() / _statistics(vae, mean)[1])


def decode_video(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Decode normalised latents (B, C, F, H, W) to a video (B, 3, 4 (F - 1) + 1, 8H, 8W) in [-1, 1], fp32."""
    mean, std = _statistics(vae, latents)
    return vae.decode((latents * std + mean).to(vae.dtype)).sample.float().clamp(-1, 1)


def encode_text(encoder: TextEncoder, ids: Tensor, mask: Tensor, *, use_mask: bool = True) -> Tensor:
    """Encode tokens; the states of padding positions are set to zero, after the encoder.

    Args:
        encoder: UMT5, or T5.
        ids: (B, L) token ids, padded.
        mask: (B, L), 1 for tokens and 0 for padding.
        use_mask: hide padding from the encoder's own attention (Wan2.1 does; `use_attention_mask` false does not).

    Returns:
        (B, L, text_dim) in the encoder's dtype.
    """
    mask = mask.to(ids.device)
    # What is added to scores: given just the mask, the library would read from the device whether it hides anything.
    hiding = (1 - mask[:, None, None].to(encoder.dtype)) * torch.finfo(encoder.dtype).min
    states = encoder(input_ids=ids, attention_mask=hiding if use_mask else None).last_hidden_state
    return states * mask[..., None].to(states.dtype)

"""The parts of a configuration file that describe the model: `ae`, `text_encoder`, `diffusion`, `predictor`.

Nothing heavy is imported here, so that a wrong setting is reported at once.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from flashi2v_model.errors import InputError

# Wan's VAE compresses space by 8 and time by 4, the first frame standing alone.
SPATIAL_STRIDE, TEMPORAL_STRIDE = 8, 4

DType = Literal["fp32", "float32", "bf16", "fp16"]
SchedulerName = Literal["euler", "heun", "unipc", "dpm++"]


def check_pretrained(path: str, key: str) -> None:
    """Refuse what is neither a directory nor, by its form, a hub id (owner/name).

    Raises:
        InputError: naming `key`, the configuration key that gave `path`.
    """
    if not Path(path).is_dir() and (Path(path).is_absolute() or path.startswith(".") or path.count("/") != 1):
        raise InputError(f"{key}: no directory {path!r}: set it to a directory in diffusers' layout or to a hub id")


class Settings(BaseModel):
    """A schema that accepts no unknown keys and converts no types (an int where a float is due is fine)."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Defaults(Settings):
    """What a model was trained for: the `defaults` of its model_index.json, which calls and commands start from.

    The shift of its noise levels stands in its scheduler's configuration.
    """

    num_frames: PositiveInt | None = None
    height: PositiveInt | None = Field(None, description="In pixels.")
    width: PositiveInt | None = Field(None, description="In pixels.")
    fps: PositiveFloat | None = Field(None, description="Frames per second.")
    num_inference_steps: PositiveInt | None = None
    guidance_scale: NonNegativeFloat | None = None
    low_freq_energy_ratio: float | None = Field(None, ge=0, le=1)


class TilingConfig(Settings):
    """Tile size and stride of the VAE, in latent rows and columns."""

    tile_size: tuple[int, int] = Field((34, 34), strict=False)
    tile_stride: tuple[int, int] = Field((18, 16), strict=False)


class AEConfig(Settings):
    """The `ae` part of a configuration file."""

    model_id: Literal["wan_video_vae"]
    from_pretrained: str
    dtype: DType = "fp32"
    enable_tiling: bool = False
    tiling_param: TilingConfig = TilingConfig()
    norm_latents: Literal[True] = Field(True, description="the transformer is trained on normalised latents")
    norm_mode: Literal["channel_specified_shift_scale"] = Field(
        "channel_specified_shift_scale", description="the statistics of Wan's VAE are given per channel"
    )
    do_sample: bool = True


class TextEncoderConfig(Settings):
    """The `text_encoder` part of a configuration file."""

    model_id: Literal["UMT5"]
    from_pretrained: str
    dtype: DType = "bf16"
    hub_backend: Literal["hf"] = Field("hf", description="other hubs are not read: name a local directory instead")
    use_attention_mask: bool = True


class DiffusionConfig(Settings):
    """The `diffusion` part of a configuration file."""

    model_id: Literal["flow_matching"]
    num_inference_steps: int = Field(50, ge=1)
    shift: float = Field(7.0, gt=0)
    guidance_scale: float = Field(5.0, ge=0)
    use_dynamic_shifting: bool = False
    use_logitnorm_time_sampling: bool = False
    training_shift: float | None = Field(
        None, gt=0, description="of training's sigmas, in the place of use_dynamic_shifting: above 1 for more noise"
    )

    @model_validator(mode="after")
    def _check(self) -> "DiffusionConfig":
        if self.training_shift is not None and self.use_dynamic_shifting:
            raise ValueError("training_shift contradicts use_dynamic_shifting: leave one of them out")
        return self


class PredictorConfig(Settings):
    """The transformer, under the names of the reference's configuration files."""

    model_id: Literal["flashi2vdit"]
    from_pretrained: str | None = None
    dtype: DType = "bf16"
    patch_size: tuple[PositiveInt, PositiveInt, PositiveInt] = Field((1, 2, 2), strict=False)
    text_len: int = Field(512, ge=1)
    in_dim: int = Field(16, ge=1)
    out_dim: int = Field(16, ge=1)
    hidden_size: int = Field(1536, ge=1)
    ffn_dim: int = Field(8960, ge=1)
    freq_dim: int = Field(256, ge=2)
    text_dim: int = Field(4096, ge=1)
    img_dim: int | None = Field(None, description="no part of this trunk reads an image embedding: without effect")
    num_heads: int = Field(12, ge=1)
    num_layers: int = Field(30, ge=1)
    qk_norm: bool = True
    qk_norm_type: Literal["rmsnorm"] = "rmsnorm"
    cross_attn_norm: bool = True
    eps: float = Field(1e-6, gt=0)
    max_seq_len: int = Field(1024, ge=1, description="longest side of the token grid")
    use_fused_rmsnorm: bool = True
    conv3x3x3_proj: bool = True
    low_freq_proj: bool = False
    fft_return_abs: bool = True
    low_freq_energy_ratio: float | Annotated[tuple[float, float], Field(strict=False)] | None = None

    @model_validator(mode="after")
    def _check(self) -> "PredictorConfig":
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 2:
            raise ValueError(f"hidden_size {self.hidden_size} must be an even multiple of num_heads {self.num_heads}")
        if self.in_dim != self.out_dim:
            raise ValueError(f"in_dim {self.in_dim} and out_dim {self.out_dim} are both the VAE's latent channels")
        ratio = self.low_freq_energy_ratio
        low, high = ratio if isinstance(ratio, tuple) else (ratio or 0.0, ratio or 0.0)
        if not 0 <= low <= high <= 1:
            raise ValueError(f"low_freq_energy_ratio must lie in [0, 1], lower bound first, got {ratio}")
        return self

    def notes(self) -> list[str]:
        """Say which keys have no effect, and why."""
        if self.img_dim is None:
            return []
        return ["predictor.img_dim has no effect: the image enters through the latent shift, not an embedding"]

    def transformer_arguments(self) -> dict[str, Any]:
        """Return the constructor arguments of `FlashI2VTransformer3DModel`."""
        return {
            "patch_size": self.patch_size,
            "num_attention_heads": self.num_heads,
            "attention_head_dim": self.hidden_size // self.num_heads,
            "in_channels": self.in_dim,
            "out_channels": self.out_dim,
            "text_dim": self.text_dim,
            "freq_dim": self.freq_dim,
            "ffn_dim": self.ffn_dim,
            "num_layers": self.num_layers,
            "cross_attn_norm": self.cross_attn_norm,
            "qk_norm": "rms_norm_across_heads" if self.qk_norm else None,
            "eps": self.eps,
            "rope_max_seq_len": self.max_seq_len,
            "conv3x3x3_proj": self.conv3x3x3_proj,
            "low_freq_proj": self.low_freq_proj,
            "fft_return_abs": self.fft_return_abs,
            "text_len": self.text_len,
        }

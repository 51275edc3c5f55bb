"""The parts of a configuration file that describe the model: `ae`, `text_encoder`, `diffusion`, `predictor`.

Nothing heavy is imported here, so that a wrong setting is told at once.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

DType = Literal["fp32", "float32", "bf16", "fp16"]


class TilingConfig(BaseModel):
    """Tile size and stride of the VAE, in latent rows and columns."""

    model_config = ConfigDict(extra="forbid")

    tile_size: tuple[int, int] = (34, 34)
    tile_stride: tuple[int, int] = (18, 16)


class AEConfig(BaseModel):
    """The `ae` part of a configuration file."""

    model_config = ConfigDict(extra="forbid")

    model_id: Literal["wan_video_vae"]
    from_pretrained: str
    dtype: DType = "fp32"
    enable_tiling: bool = False
    tiling_param: TilingConfig = TilingConfig()
    norm_latents: Literal[True] = True
    norm_mode: Literal["channel_specified_shift_scale"] = "channel_specified_shift_scale"
    do_sample: bool = True


class TextEncoderConfig(BaseModel):
    """The `text_encoder` part of a configuration file."""

    model_config = ConfigDict(extra="forbid")

    model_id: Literal["UMT5"]
    from_pretrained: str
    dtype: DType = "bf16"
    hub_backend: Literal["hf"] = "hf"
    use_attention_mask: bool = True


class DiffusionConfig(BaseModel):
    """The `diffusion` part of a configuration file."""

    model_config = ConfigDict(extra="forbid")

    model_id: Literal["flow_matching"]
    num_inference_steps: int = Field(50, ge=1)
    shift: float = Field(7.0, gt=0)
    guidance_scale: float = Field(5.0, ge=0)
    use_dynamic_shifting: bool = False
    use_logitnorm_time_sampling: bool = False


class PredictorConfig(BaseModel):
    """The transformer, under the names of the reference's configuration files."""

    model_config = ConfigDict(extra="forbid")

    model_id: Literal["flashi2vdit"]
    from_pretrained: str | None = None
    dtype: DType = "bf16"
    patch_size: tuple[int, int, int] = (1, 2, 2)
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
    low_freq_energy_ratio: float | tuple[float, float] | None = None

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
        }

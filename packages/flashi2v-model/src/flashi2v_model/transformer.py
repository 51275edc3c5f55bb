"""The FlashI2V transformer: Wan2.1's text-to-video trunk with Fourier features and latent shift.

B batch, C latent channels, F frames, H W latent grid, N tokens, L text tokens, D width.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from torch import Tensor, nn

from flashi2v_model.acceleration import Accelerated
from flashi2v_model.layers import Block, ConditionEmbedder, FP32Linear, LatentShift, modulation, rope_tables
from flashi2v_model.lora_layers import adapters_scaled
from flashi2v_model.single_file import OriginalModel
from flashi2v_model.strict import StrictModel
from flashi2v_npu_ops import layer_norm_modulate, route_conv3d, split_frequencies

# What `embed` is given, in order. What a variant's asks for beyond these is its conditioning.
EMBED_INPUTS = ("hidden_states", "timestep", "encoder_hidden_states", "condition", "low_freq_energy_ratio")


# How long still start values make the video's part of a token, per number of it, before blocks add theirs.
_START_LENGTH = 3.0
# How strongly they let tokens attend to near ones: with heads of 64 channels, those 1, 2 and 3 places away have about
# 0.6, 0.2 and 0.07 of the weight of the own place.
_NEARNESS = 4.0


# The last two bases are there already; diffusers looks for its own in this module.
class FlashI2VTransformer3DModel(StrictModel, OriginalModel, Accelerated, ModelMixin, ConfigMixin):
    """Velocity network of FlashI2V.

    Parameter and config names follow diffusers' `WanTransformer3DModel`, plus `learnable_proj` (the latent shift phi)
    and `fourier_embedding`.

    A variant is a subclass that overrides `embed`, and adds or removes modules in its constructor. What its `embed`
    asks for beyond the usual arguments, by name, is its conditioning: tensors (B,) or (B, n). A constructor with
    arguments of its own takes the others as `**config`, and hands its own to `register_to_config`.

    Args:
        patch_size: (frames, height, width) of latent per token.
        num_attention_heads: K; the width is D = K * attention_head_dim.
        attention_head_dim: d.
        in_channels: channels of the noisy latent, and of the Fourier features.
        out_channels: channels of the velocity.
        text_dim: width of the text encoder's states.
        freq_dim: width of the sinusoidal time embedding.
        ffn_dim: hidden width of the MLP.
        num_layers: number of blocks.
        cross_attn_norm: affine layer norm before cross attention.
        qk_norm: "rms_norm_across_heads", or None for none.
        eps: of all norms.
        rope_max_seq_len: longest side of the token grid.
        conv3x3x3_proj: the shift's convolutions reach over time (the released NPU model).
        low_freq_proj: the shift reads the low-pass of the condition instead of the condition.
        fft_return_abs: the high-pass features are magnitudes.
        text_len: L, text tokens, padding included, that cross attention is trained with; samplers pad to it.
    """

    _no_split_modules = ["Block"]  # noqa: RUF012 (diffusers declares it so)
    _supports_gradient_checkpointing = True
    _repeated_blocks = ["Block"]  # noqa: RUF012 (what `compile_repeated_blocks` compiles)
    _keep_in_fp32_modules = ["time_embedder", "time_proj", "scale_shift_table", "norm2"]  # noqa: RUF012
    # `enable_layerwise_casting` stores weights in 8 bits; these layers read the dtype that they compute in off theirs.
    _skip_layerwise_casting_patterns = (
        "patch_embedding",
        "fourier_embedding",
        "learnable_proj",
        "condition_embedder",
        "norm",
    )

    conditioning_names: ClassVar[tuple[str, ...]] = ()  # what `embed` asks for by name, in a variant

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        asked = inspect.signature(cls.embed).parameters.values()
        named = [one.name for one in asked if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
        cls.conditioning_names = tuple(name for name in named[1:] if name not in EMBED_INPUTS)

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        num_attention_heads: int = 12,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 8960,
        num_layers: int = 30,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        rope_max_seq_len: int = 1024,
        conv3x3x3_proj: bool = True,
        low_freq_proj: bool = False,
        fft_return_abs: bool = True,
        text_len: int = 512,
    ) -> None:
        super().__init__()
        if qk_norm not in ("rms_norm_across_heads", None):
            raise ValueError(f"qk_norm must be 'rms_norm_across_heads' or None, got {qk_norm!r}")
        if attention_head_dim % 2:
            raise ValueError(f"attention_head_dim must be even for rotary embedding, got {attention_head_dim}")
        patch = (patch_size[0], patch_size[1], patch_size[2])
        dim = num_attention_heads * attention_head_dim
        self.patch_embedding = nn.Conv3d(in_channels, dim, patch, stride=patch)
        self.fourier_embedding = nn.Sequential(
            nn.Conv3d(in_channels, dim, patch, stride=patch), nn.Conv3d(dim, dim, kernel_size=1)
        )
        self.learnable_proj = LatentShift(in_channels, conv3x3x3_proj)
        self.condition_embedder = ConditionEmbedder(dim, freq_dim, text_dim)
        self.blocks = nn.ModuleList(
            Block(
                dim, ffn_dim, num_attention_heads, qk_norm=qk_norm is not None, cross_attn_norm=cross_attn_norm, eps=eps
            )
            for _ in range(num_layers)
        )
        self.proj_out = FP32Linear(dim, out_channels * patch[0] * patch[1] * patch[2])
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.modulation = nn.Identity()  # where an adapter changes the table
        self.gradient_checkpointing = False  # by `enable_gradient_checkpointing`
        self.reset_parameters()
        route_conv3d(self)

    def reset_parameters(self) -> None:
        """Set training's start values: Wan2.1's for the trunk; the new layers start as if they were not there."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        embedder = self.condition_embedder
        for mlp in (embedder.time_embedder, embedder.text_embedder):
            nn.init.normal_(mlp.linear_1.weight, std=0.02)
            nn.init.normal_(mlp.linear_2.weight, std=0.02)
        for embedding in (self.patch_embedding, self.fourier_embedding[0]):
            nn.init.xavier_uniform_(embedding.get_parameter("weight").flatten(1))
        for last in (self.proj_out, self.fourier_embedding[1], self.learnable_proj.proj[2]):
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    @torch.no_grad()
    def start_still(self) -> None:
        """Set start values under which a video stays as its first frame is; what is left to learn is how it moves.

        With z = c in all frames the shift s = c makes x_t = sigma (eps - c), and the velocity is eps - c. So the shift
        starts as the condition itself, and what enters leaves again, with the length of 2 n standard normal numbers, as
        the head's norm has taken sigma away. Learning that from zero takes a small model long. And tokens attend to
        what is near them, in all frames: how far away to look, and where to, is what motion is.

        Raises:
            ValueError: tokens have fewer channels than what enters them has numbers.
        """
        width, entries = self.patch_embedding.out_channels, self.patch_embedding.weight[0].numel()
        if width < entries:
            raise ValueError(f"{entries} numbers of a patch do not pass through tokens of {width} channels")
        channels = self.config.in_channels
        proj = self.learnable_proj.proj
        into, bias, out_of = (proj.get_parameter(name) for name in ("0.weight", "0.bias", "2.weight"))
        middle = tuple(length // 2 for length in into.shape[2:])
        out_of.zero_()
        for i in range(channels):
            for j, sign in ((i, 1), (channels + i, -1)):  # silu(c) - silu(-c) = c
                into[j], bias[j] = 0, 0
                there, back = (j, i, *middle), (i, j, *middle)
                into[there] = out_of[back] = sign
        basis = torch.linalg.qr(torch.randn(width, entries))[0]  # (D, n), its columns orthonormal
        self.patch_embedding.weight.copy_(_START_LENGTH * basis.reshape(self.patch_embedding.weight.shape))
        self.patch_embedding.get_parameter("bias").zero_()
        ends = basis.T.reshape(channels, *self.config.patch_size, width).permute(1, 2, 3, 0, 4).reshape(entries, width)
        self.proj_out.weight.copy_(ends * math.sqrt(2 * entries / width))

        heads, head_dim = self.config.num_attention_heads, self.config.attention_head_dim
        spatial = 2 * (head_dim // 6)
        near = torch.zeros(heads, head_dim)
        for begin in (head_dim - 2 * spatial, head_dim - spatial):  # of height and width: the pairs that turn quickest
            near[:, begin : begin + min(4, spatial) : 2] = _NEARNESS
        for block in self.blocks.children():
            for projection in ("to_q", "to_k"):
                block.get_parameter(f"attn1.{projection}.bias").copy_(near.flatten())

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        condition: Tensor,
        low_freq_energy_ratio: float | Tensor = 0.1,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        conditioning: Mapping[str, Tensor] | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the velocity eps - z of a noisy latent that starts with a given frame.

        Args:
            hidden_states: y (B, C, F, H, W), the plain noisy latent sigma * eps + (1 - sigma) * z; H and W divisible by
                the patch. It stays in fp32, whatever the dtype of the weights.
            timestep: (B,), 1000 * sigma; every sample may have its own.
            encoder_hidden_states: (B, L, text_dim), padding positions zeroed.
            condition: c (B, C, 1, H, W), the normalised latent of the first frame.
            low_freq_energy_ratio: in [0, 1], one number or (B,): where the high frequencies of c start.
            attention_kwargs: {"scale": weight of the adapters}, as diffusers' pipelines hand it on.
            return_dict: return a `Transformer2DModelOutput` instead of a tuple.
            conditioning: what the `embed` of a variant asks for, by name.

        Returns:
            (B, C, F, H, W) in fp32.

        Raises:
            ValueError: shapes do not match each other or the patch; `attention_kwargs` has another key; `conditioning`
                has others than `conditioning_names`.

        Source: FlashI2V, arXiv 2509.25187.
        """
        grid = self.token_grid(hidden_states.shape)
        _check_shape("timestep", timestep, hidden_states.shape[:1])
        batch, channels, _, height, width = hidden_states.shape
        _check_shape("condition", condition, (batch, channels, 1, height, width))
        more = dict(conditioning or {})
        if sorted(more) != sorted(self.conditioning_names):
            raise ValueError(f"conditioning must name {self.conditioning_names} here, got {sorted(more)}")
        with adapters_scaled(self, attention_kwargs):
            x, text, time, modulation = self.embed(
                hidden_states, timestep, encoder_hidden_states, condition, low_freq_energy_ratio, **more
            )
            velocity = self.project(self.run_blocks(x, text, modulation, grid), time, grid)
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    def trunk(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, fourier_features: Tensor
    ) -> Tensor:
        """Return the velocity, (B, C, F, H, W) in fp32: the network behind the shift.

        Args:
            hidden_states: y - s (B, C, F, H, W), the shifted noisy latent.
            timestep: as of `forward`.
            encoder_hidden_states: as of `forward`.
            fourier_features: (B, C, F, H, W), the high frequencies of the first frame, for every frame.

        Raises:
            ValueError: shapes do not match each other or the patch.
        """
        grid = self.token_grid(hidden_states.shape)
        _check_shape("timestep", timestep, hidden_states.shape[:1])
        _check_shape("fourier_features", fourier_features, hidden_states.shape)
        features = self.fourier_embedding(fourier_features.to(self.patch_embedding.weight.dtype))
        x, text, time, modulation = self.tokens(hidden_states, timestep, encoder_hidden_states, features)
        return self.project(self.run_blocks(x, text, modulation, grid), time, grid)

    # The three parts of the forward pass; a pipeline stage has some of the blocks, and the first and last part perhaps.

    def embed(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        condition: Tensor,
        low_freq_energy_ratio: float | Tensor = 0.1,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return tokens (B, N, D), text (B, L, D), time (B, D) and its modulation (B, 6, D); arguments of `forward`.

        How the first frame guides the video is here alone: a variant of the method overrides this.
        """
        shift, features = self.guide(condition, hidden_states.shape[2], low_freq_energy_ratio)
        # Rounded to the weights' dtype once, behind the shift.
        exact = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        return self.tokens(exact - shift, timestep, encoder_hidden_states, features)

    def guide(self, condition: Tensor, num_frames: int, low_freq_energy_ratio: float | Tensor) -> tuple[Tensor, Tensor]:
        """Return what the first frame contributes: the shift s, and its high frequencies, embedded as tokens are.

        Args:
            condition: as of `forward`.
            num_frames: F.
            low_freq_energy_ratio: as of `forward`.

        Returns:
            (B, C, F, H, W), and (B, D, ...) on the grid of tokens, the same for all frames.
        """
        with torch.no_grad():
            high, low, _ = split_frequencies(
                condition[:, :, 0], low_freq_energy_ratio, magnitude=self.config.fft_return_abs
            )
        source = low[:, :, None] if self.config.low_freq_proj else condition
        patch_frames = self.config.patch_size[0]
        features = self.fourier_embedding(
            high[:, :, None].expand(-1, -1, patch_frames, -1, -1).to(self.patch_embedding.weight.dtype)
        )
        return self.learnable_proj(source, num_frames), features.expand(-1, -1, num_frames // patch_frames, -1, -1)

    def tokens(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        features: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what `embed` does; arguments of `trunk`, and features of `guide`, which a variant may leave out."""
        time, modulation, text = self.condition_embedder(timestep, encoder_hidden_states)
        x = self.patch_embedding(hidden_states.to(self.patch_embedding.weight.dtype))
        x = x if features is None else x + features
        # In the order in which they will be read: sums take over the order of what comes first, so a mere view would
        # leave the tokens of all blocks in the order of the convolution, and every norm would copy them.
        return rearrange(x, "b d f h w -> b (f h w) d").contiguous(), text, time, modulation

    def run_blocks(self, x: Tensor, text: Tensor, modulation: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Return the tokens, (B, N, D), behind all blocks; arguments as `embed` returns them."""
        rope = rope_tables(grid, self.config.attention_head_dim, x.device)
        again = self.gradient_checkpointing and torch.is_grad_enabled()
        for block in self.blocks.children():
            run = partial(self._gradient_checkpointing_func, block) if again else block
            x = run(x, text, modulation, rope)
        return x

    def project(self, x: Tensor, time: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Return the velocity, (B, C, F, H, W) in fp32, of the tokens (B, N, D) at times (B, D)."""
        shift, scale = modulation(self.modulation(self.scale_shift_table), time[:, None])
        head = layer_norm_modulate(x.to(shift.dtype), shift, scale, self.config.eps)
        out = self.proj_out(head)  # (B, N, C*patch)
        frames, height, width = grid
        pf, ph, pw = self.config.patch_size
        velocity = rearrange(
            out,
            "b (f h w) (pf ph pw c) -> b c (f pf) (h ph) (w pw)",
            f=frames,
            h=height,
            w=width,
            pf=pf,
            ph=ph,
            pw=pw,
        )
        return velocity.contiguous()  # FSDP2 warns of views, which patches of 1x1 would leave

    def token_grid(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Return (F, H, W) of the tokens of a latent.

        Args:
            shape: of the latent, (B, C, F, H, W).

        Raises:
            ValueError: it is not divisible by the patch, or longer than `rope_max_seq_len`.
        """
        if len(shape) != 5:
            raise ValueError(f"hidden_states must be (B, C, F, H, W), got {tuple(shape)}")
        sizes = tuple(shape[2:])
        patch = self.config.patch_size
        if any(size % step for size, step in zip(sizes, patch)):
            raise ValueError(f"latent (F, H, W) = {sizes} is not divisible by the patch {tuple(patch)}")
        frames, height, width = (size // step for size, step in zip(sizes, patch))
        if max(frames, height, width) > self.config.rope_max_seq_len:
            raise ValueError(
                f"token grid {(frames, height, width)} exceeds rope_max_seq_len = {self.config.rope_max_seq_len}"
            )
        return frames, height, width


def _check_shape(name: str, tensor: Tensor, expected: Sequence[int]) -> None:
    if tensor.shape != torch.Size(expected):
        raise ValueError(f"{name} must be {tuple(expected)} beside these hidden_states, got {tuple(tensor.shape)}")

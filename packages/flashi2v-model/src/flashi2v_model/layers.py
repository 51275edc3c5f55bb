"""Parts of the diffusion transformer.

B batch, F frames, H W token grid (latent grid / 2), N = F*H*W tokens, L text tokens, D width, K heads, d head size.
Module names follow diffusers' `WanTransformer3DModel`, so its weights and LoRA adapters fit.  Where a model is stored
in bf16, norms, modulation, gated residual adds, time embedding and head still compute in fp32.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from torch import Tensor, nn

from flashi2v_model.kernels import attention_kernel
from flashi2v_model.quantization import is_quantized
from flashi2v_npu_ops import apply_rope, attention, gated_residual, gelu_tanh, layer_norm_modulate, rms_norm
from flashi2v_npu_ops.tables import computed_once


class FP32Linear(nn.Linear):
    """A linear layer that computes in fp32 or better, whatever its weights are stored as."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.dequantize() if is_quantized(self.weight) else self.weight
        exact = torch.promote_types(weight.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(exact)
        return F.linear(x.to(exact), weight.to(exact), bias)


class FP32LayerNorm(nn.LayerNorm):
    """A layer norm that computes in fp32 or better and returns the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        weight, bias = (None if p is None else p.to(exact) for p in (self.weight, self.bias))
        return F.layer_norm(x.to(exact), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class RMSNorm(nn.Module):
    """RMS norm over the full width D, before the split into heads.

    Attributes:
        backend: of `flashi2v_npu_ops.rms_norm`.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps
        self.backend = "auto"

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, backend=self.backend)


def use_fused_rms_norm(model: nn.Module, fused: bool) -> None:
    """Let a model's RMS norms be served by the best kernel of its device, or by the reference in plain torch."""
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.backend = "auto" if fused else "reference"


class AttentionProcessor:
    """How an `Attention` computes, in the place where diffusers' models have their processors.

    Attributes:
        _attention_backend: which kernel attends, as `set_attention_backend` puts it; see `kernels.attention_kernel`.
    """

    _attention_backend: str | None = None

    def __call__(
        self,
        attn: "Attention",
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return (B, N, D); arguments as of `Attention.forward`."""
        if encoder_hidden_states is not None:
            query, (key, value) = attn.queries(hidden_states), attn.keys_values(encoder_hidden_states)
        else:
            query, key, value = attn.all_of(hidden_states)
        if rotary_emb is not None:
            query, key = apply_rope(query, *rotary_emb), apply_rope(key, *rotary_emb)
        return attn.to_out[0](attn.attend(query, key, value).flatten(-2))  # (B, N, D)


class Attention(nn.Module, AttentionModuleMixin):
    """Multi-head attention; self attention turns queries and keys by `rotary_emb`, cross attention reads the text.

    Attributes:
        attend: takes query, key, value, (B, N, K, d) each; see `flashi2v_model.parallel`.
        is_cross_attention: as hooks of diffusers ask.
    """

    _default_processor_cls = AttentionProcessor
    use_bias = True  # of what `fuse_projections` makes
    to_kv: nn.Module
    to_qkv: nn.Module

    def __init__(self, dim: int, num_heads: int, qk_norm: bool, eps: float, *, is_cross_attention: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.is_cross_attention = is_cross_attention
        self.attend: Callable[[Tensor, Tensor, Tensor], Tensor] = self._attend
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q = RMSNorm(dim, eps) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(dim, eps) if qk_norm else nn.Identity()
        self.processor: Callable[..., Tensor] = AttentionProcessor()

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Take tokens (B, N, D), the text (B, L, D) where they read it, and the rotary tables; return (B, N, D)."""
        return self.processor(self, hidden_states, encoder_hidden_states, rotary_emb=rotary_emb)

    def queries(self, hidden_states: Tensor) -> Tensor:
        """Return the queries of (B, N, D): (B, N, K, d)."""
        return self._heads(self.norm_q(self.to_q(hidden_states)))

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of (B, N, D): (B, N, K, d) each."""
        key, value = (
            self.to_kv(source).chunk(2, -1) if self.fused_projections else (self.to_k(source), self.to_v(source))
        )
        return self._heads(self.norm_k(key)), self._heads(value)

    def all_of(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of the same tokens (B, N, D): (B, N, K, d) each."""
        if not self.fused_projections:
            return self.queries(hidden_states), *self.keys_values(hidden_states)
        query, key, value = self.to_qkv(hidden_states).chunk(3, -1)
        return self._heads(self.norm_q(query)), self._heads(self.norm_k(key)), self._heads(value)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        asked = getattr(self.processor, "_attention_backend", None)
        return attention(query, key, value, backend=attention_kernel(asked))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))


class GELUProjection(nn.Module):
    """Linear, then tanh GELU."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return gelu_tanh(self.proj(x))


class FeedForward(nn.Module):
    """The block's MLP.  The identity keeps diffusers' numbering (its place holds a dropout there)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GELUProjection(dim, hidden_dim), nn.Identity(), nn.Linear(hidden_dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def modulation(table: Tensor, time: Tensor) -> tuple[Tensor, ...]:
    """Return shifts, scales and gates, (B, 1, D) each, of a table (1, n, D) and an embedded time (B, n or 1, D)."""
    return (table.to(time.dtype) + time).chunk(table.shape[1], dim=1)


class Block(nn.Module):
    """Self attention with RoPE, cross attention to the text, MLP; all but the cross attention are modulated by time."""

    def __init__(
        self, dim: int, ffn_dim: int, num_heads: int, *, qk_norm: bool, cross_attn_norm: bool, eps: float
    ) -> None:
        super().__init__()
        self.eps = eps
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.modulation = nn.Identity()  # where an adapter changes the table
        self.attn1 = Attention(dim, num_heads, qk_norm, eps, is_cross_attention=False)
        self.norm2 = FP32LayerNorm(dim, eps) if cross_attn_norm else nn.Identity()
        self.attn2 = Attention(dim, num_heads, qk_norm, eps, is_cross_attention=True)
        self.ffn = FeedForward(dim, ffn_dim)

    # Hooks of diffusers find the arguments by these names.
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Take tokens (B, N, D), text (B, L, D), time modulation (B, 6, D), rotary tables; return (B, N, D)."""
        x = hidden_states
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(self.modulation(self.scale_shift_table), temb)
        x = gated_residual(
            x, self.attn1(layer_norm_modulate(x, shift1, scale1, self.eps), rotary_emb=rotary_emb), gate1
        )
        x = x + self.attn2(self.norm2(x), encoder_hidden_states=encoder_hidden_states)
        return gated_residual(x, self.ffn(layer_norm_modulate(x, shift2, scale2, self.eps)), gate2)


class TimeEmbedder(nn.Module):
    """MLP on the sinusoidal embedding of the timestep."""

    def __init__(self, freq_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = FP32Linear(freq_dim, dim)
        self.linear_2 = FP32Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class TextEmbedder(nn.Module):
    """MLP on the text encoder's states."""

    def __init__(self, text_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(text_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(gelu_tanh(self.linear_1(x.to(self.linear_1.weight.dtype))))


class ConditionEmbedder(nn.Module):
    """Timestep and text, embedded."""

    def __init__(self, dim: int, freq_dim: int, text_dim: int) -> None:
        super().__init__()
        self.freq_dim = freq_dim
        self.time_embedder = TimeEmbedder(freq_dim, dim)
        self.time_proj = FP32Linear(dim, 6 * dim)
        self.text_embedder = TextEmbedder(text_dim, dim)

    def forward(self, timestep: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take timestep (B,), text (B, L, text_dim); return time (B, D), its projection (B, 6, D), text (B, L, D)."""
        time, modulation = self.embed_time(timestep.to(text.device))
        return time, modulation, self.text_embedder(text)

    def embed_time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Take timestep (B,); return time (B, D) and its projection (B, 6, D)."""
        time = self.time_embedder(timestep_embedding(timestep, self.freq_dim))
        return time, self.time_proj(F.silu(time)).unflatten(-1, (6, -1))


def timestep_embedding(timestep: Tensor, dim: int) -> Tensor:
    """Return [cos | sin] of timestep * 10000^(-i / (dim / 2)): (B, dim) in fp32, exact to 1e-6, on any device.

    Angles of a thousand need more digits than fp32 has, and not every device has fp64. So an angle is counted in turns,
    of which only the fraction matters: factors of 12 bits have exact products.
    """
    coarse, fine = _turns(dim, timestep.device)
    t = timestep.float()[:, None]
    quarters = (t * 4).floor() / 4  # 12 bits, up to 1000
    whole = quarters * coarse  # (B, dim/2), exact
    fraction = (whole - whole.round()) + (quarters * fine + (t - quarters) * coarse + (t - quarters) * fine)
    angles = 2 * math.pi * (fraction - fraction.round())
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


@computed_once(maxsize=16)
def _turns(dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the turns of one timestep, in 12 bits and what is left of them: (dim / 2,) each."""
    with torch.inference_mode(False):
        turns = torch.pow(10000.0, -torch.arange(dim // 2, dtype=torch.float64) / (dim // 2)) / (2 * math.pi)
        mantissa, exponent = torch.frexp(turns)
        coarse = torch.ldexp((mantissa * 2**12).round(), exponent - 12)
        return coarse.float().to(device), (turns - coarse).float().to(device)


@computed_once(maxsize=16)
def rope_tables(
    grid: tuple[int, int, int], head_dim: int, device: torch.device, theta: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the 3-D rotary angles of a token grid (F, H, W): (N, d / 2) each, fp32 from fp64 angles.

    Height and width take 2 * (d // 6) channels each, time the rest.
    """
    spatial = 2 * (head_dim // 6)
    # Tables made while sampling must stay usable in a training step of the same process.
    with torch.inference_mode(False):
        angles = []
        for axis, (length, dim) in enumerate(zip(grid, (head_dim - 2 * spatial, spatial, spatial))):
            frequencies = torch.pow(theta, -torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            table = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)  # (length, dim/2)
            shape = [1, 1, 1, -1]
            shape[axis] = length
            angles.append(table.view(shape).expand(*grid, -1))
        joined = torch.cat(angles, dim=-1).flatten(0, 2)  # (N, d/2)
        return joined.cos().float().to(device), joined.sin().float().to(device)


class LatentShift(nn.Module):
    """phi: what is taken away from noise and video alike, read off the first frame's latent.

    Source: FlashI2V, arXiv 2509.25187, latent shifting.
    """

    def __init__(self, channels: int, conv3x3x3: bool) -> None:
        super().__init__()
        self.conv3x3x3 = conv3x3x3
        kernel, padding = ((3, 3, 3), (1, 1, 1)) if conv3x3x3 else ((1, 3, 3), (0, 1, 1))
        self.proj = nn.Sequential(
            nn.Conv3d(channels, 4 * channels, kernel, padding=padding),
            nn.SiLU(),
            nn.Conv3d(4 * channels, channels, kernel, padding=padding),
        )

    def forward(self, condition: Tensor, num_frames: int) -> Tensor:
        """Take the condition (B, C, 1, H, W); return the shift (B, C, F, H, W)."""
        condition = condition.to(self.proj[0].get_parameter("weight").dtype)
        if self.conv3x3x3:  # zero padding in time makes the frames differ, so repeat first
            return self.proj(condition.expand(-1, -1, num_frames, -1, -1))
        return self.proj(condition).expand(-1, -1, num_frames, -1, -1)

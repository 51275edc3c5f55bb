"""Networks of random numbers, made on the device, and how long their calls take.

B batch, C latent channels, F latent frames, H W latent grid, L text tokens.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn

from flashi2v_infer.load import cast
from flashi2v_model import FlashI2VTransformer3DModel
from flashi2v_model.config import SPATIAL_STRIDE, TEMPORAL_STRIDE
from flashi2v_model.presets import TRANSFORMERS
from flashi2v_npu_ops import device as devices

# What is called, and what holds while it is.
Call = tuple[Callable[[], Tensor], Callable[[], AbstractContextManager[Any]]]


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
        network: constructor arguments of the transformer.
        video: frames, height and width in pixels.
        text: tokens.
        dtype: of the network.
        matrix: side of the square matrices whose product is the machine's own rate.
        probes: size of the operators, as of `flashi2v_npu_ops.probe`.
        repeats: timed calls of each turn.
        compiler: backend of torch.compile.
        vae: constructor arguments.
    """

    network: Mapping[str, Any]
    video: tuple[int, int, int]
    text: int
    dtype: torch.dtype
    matrix: int
    probes: str
    repeats: int
    compiler: str = "inductor"
    vae: Mapping[str, Any] = field(default_factory=dict)

    @property
    def latents(self) -> tuple[int, int, int, int, int]:
        """(B, C, F, H, W)."""
        frames, height, width = self.video
        return 1, 16, (frames - 1) // TEMPORAL_STRIDE + 1, height // SPATIAL_STRIDE, width // SPATIAL_STRIDE


_LARGE, _TINY = TRANSFORMERS["1.3b"], TRANSFORMERS["tiny"]
_EIGHT = {"num_attention_heads": 4, "attention_head_dim": 64, "ffn_dim": 1024, "num_layers": 8, "text_dim": 64}
SIZES = {
    "full": Size(_LARGE, (49, 480, 832), 512, torch.bfloat16, 8192, "real", 3),
    "cpu": Size(_LARGE, (17, 128, 128), 512, torch.float32, 2048, "tiny", 2),
    "eight": Size(_EIGHT, (33, 128, 128), 64, torch.float32, 2048, "tiny", 10),
    "small": Size(
        _TINY,
        (5, 32, 48),
        16,
        torch.bfloat16,
        256,
        "tiny",
        1,
        "aot_eager",
        {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1},
    ),
}


def our_network(size: Size, device: torch.device) -> FlashI2VTransformer3DModel:
    """Return the network with random numbers, the same each time."""
    with torch.device("meta"):
        model = FlashI2VTransformer3DModel(**size.network)
    cast(model, size.dtype)
    model.to_empty(device=device)
    random = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.02, generator=random)
    return model.requires_grad_(False).eval()


def wan_network(ours: FlashI2VTransformer3DModel, size: Size) -> WanTransformer3DModel:
    """Return diffusers' network on the very tensors of ours, but for the few that it computes in another dtype."""
    config = {name: value for name, value in size.network.items() if name != "text_len"}
    with torch.device("meta"):
        model = WanTransformer3DModel(**config)
    shared = {name: tensor for name, tensor in ours.state_dict().items() if name in model.state_dict()}
    model.load_state_dict(shared, assign=True)
    cast(model, size.dtype)  # by its own list of what stays in fp32
    rope = model.rope  # whose tables are no weights
    model.rope = type(rope)(rope.attention_head_dim, rope.patch_size, rope.max_seq_len).to(ours.device)
    return model.requires_grad_(False).eval()


def random_vae(size: Size, dtype: torch.dtype, device: torch.device) -> AutoencoderKLWan:
    """Return the VAE with random numbers."""
    with device:
        vae = AutoencoderKLWan(**size.vae)
    return vae.to(dtype).requires_grad_(False).eval()


def inputs_of(size: Size, network: nn.Module, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return noisy latents (B, C, F, H, W), timestep (B,), text (B, L, text_dim), condition (B, C, 1, H, W)."""
    random = torch.Generator(device).manual_seed(1)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=random, device=device).to(dtype)

    batch, channels, _, height, width = size.latents
    text = normal(batch, size.text, network.config.text_dim, dtype=size.dtype)
    condition = normal(batch, channels, 1, height, width)
    return normal(*size.latents), torch.full((batch,), 500.0, device=device), text, condition


def seconds_of(call: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Return the seconds of calls, waiting for the device after each."""
    found = []
    for _ in range(repeats):
        devices.synchronize(device)
        begin = time.perf_counter()
        call()
        devices.synchronize(device)
        found.append(time.perf_counter() - begin)
    return found


def in_turns(calls: Mapping[str, Call], device: torch.device, repeats: int) -> dict[str, float]:
    """Return the median seconds of each call, measured in turns (A B B A), each behind one call that is not counted."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for name in (*calls, *reversed(calls)):
        call, context = calls[name]
        with context():
            call()
            found[name] += seconds_of(call, device, repeats)
    return {name: statistics.median(times) for name, times in found.items()}


def alone(call: Callable[[], Tensor]) -> Call:
    """Return a call that needs nothing around it."""
    return call, nullcontext


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the norm of the difference over the norm."""
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())

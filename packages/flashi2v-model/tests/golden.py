"""Reference numbers, computed once by running the public FlashI2V code in fp32 on a small model.

Weights and inputs come from a 32-bit integer hash of name and index, so that no random generator is involved.
"""

import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flashi2v_model import FlashI2VTransformer3DModel, convert_state_dict

NUMBERS = dict(np.load(Path(__file__).with_name("golden.npz")).items())

SMALL = {
    "num_attention_heads": 4,
    "attention_head_dim": 24,
    "text_dim": 24,
    "freq_dim": 32,
    "ffn_dim": 128,
    "num_layers": 3,
}


def number(name: str) -> Tensor:
    return torch.from_numpy(NUMBERS[name])


def hashed(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers in [-1, 1) that depend on the name and the position alone, float64."""
    count = int(np.prod(shape))
    mask = 0xFFFFFFFF
    state = (np.arange(count, dtype=np.uint64) * 2654435761 + zlib.crc32(name.encode())) & mask
    for shift, factor in ((16, 2246822519), (13, 3266489917)):
        state = ((state ^ (state >> np.uint64(shift))) * factor) & mask
    state ^= state >> np.uint64(16)
    return (state / 2**31 - 1).reshape(shape)


def weight(key: str, shape: tuple[int, ...]) -> Tensor:
    """A weight under its Wan2.1 name."""
    values = hashed(key, shape)
    if key.endswith((".norm_q.weight", ".norm_k.weight", ".norm3.weight")):
        values = 1 + 0.1 * values
    elif key.endswith("modulation"):
        values = 0.3 * values
    elif key.endswith(".bias"):
        values = 0.1 * values
    else:
        values = values * np.sqrt(3 / np.prod(shape[1:]))
    return torch.from_numpy(values.astype(np.float32))


def tensor(name: str, shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
    return torch.from_numpy((scale * hashed(name, shape)).astype(np.float32))


def small_model(**changes: object) -> FlashI2VTransformer3DModel:
    """The model whose outputs are in `golden.npz`."""
    model = FlashI2VTransformer3DModel(**{**SMALL, **changes})
    canonical = convert_state_dict(model.state_dict(), target="main")
    weights = {key: weight(key, tuple(value.shape)) for key, value in canonical.items()}
    model.load_state_dict(convert_state_dict(weights, "main"))
    return model

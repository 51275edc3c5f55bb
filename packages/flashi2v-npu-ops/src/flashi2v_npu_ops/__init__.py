"""One written contract per operator of FlashI2V, and the backend that serves it best on each device."""

from flashi2v_npu_ops.attention import attention
from flashi2v_npu_ops.fourier import split_frequencies
from flashi2v_npu_ops.norm import rms_norm
from flashi2v_npu_ops.registry import UnsupportedError, backends, set_backend
from flashi2v_npu_ops.rope import apply_rope

__version__ = "0.1.0"

__all__ = [
    "UnsupportedError",
    "apply_rope",
    "attention",
    "backends",
    "rms_norm",
    "set_backend",
    "split_frequencies",
]

"""One written contract per operator of FlashI2V, and the backend that serves it best on each device."""

import importlib.util
import os
import sys


def _import_torch_alone() -> None:
    """Import torch without the extensions that it loads by itself.

    Where torch_npu is installed and CANN is not, that loading fails, and `import torch` with it. torch_npu is imported
    here when an NPU is asked for. Whoever sets TORCH_DEVICE_BACKEND_AUTOLOAD, or imports torch first, decides.
    """
    name = "TORCH_DEVICE_BACKEND_AUTOLOAD"
    if "torch" in sys.modules or name in os.environ or importlib.util.find_spec("torch_npu") is None:
        return
    os.environ[name] = "0"
    try:
        importlib.import_module("torch")
    finally:
        del os.environ[name]


_import_torch_alone()

from flashi2v_npu_ops import ascend, cuda  # noqa: E402 (they register their backends)
from flashi2v_npu_ops.activation import gelu_tanh  # noqa: E402
from flashi2v_npu_ops.attention import attention  # noqa: E402
from flashi2v_npu_ops.fourier import split_frequencies  # noqa: E402
from flashi2v_npu_ops.modulation import gated_residual, layer_norm_modulate  # noqa: E402
from flashi2v_npu_ops.norm import rms_norm  # noqa: E402
from flashi2v_npu_ops.optimizer import fused_adamw  # noqa: E402
from flashi2v_npu_ops.registry import UnsupportedError, backends, explain, set_backend, use_backend  # noqa: E402
from flashi2v_npu_ops.rope import apply_rope  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "UnsupportedError",
    "apply_rope",
    "ascend",
    "attention",
    "backends",
    "cuda",
    "explain",
    "fused_adamw",
    "gated_residual",
    "gelu_tanh",
    "layer_norm_modulate",
    "rms_norm",
    "set_backend",
    "split_frequencies",
    "use_backend",
]

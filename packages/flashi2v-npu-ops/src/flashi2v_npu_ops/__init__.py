"""One written contract per operator of FlashI2V, and the backend that serves it best on each device."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashi2v_npu_ops import device, testing
    from flashi2v_npu_ops.operators import (
        apply_rope,
        attention,
        attention_part,
        attention_part_grad,
        conv3d,
        gated_residual,
        gelu_tanh,
        layer_norm_modulate,
        merge_parts,
        rms_norm,
        route_conv3d,
        split_frequencies,
    )
    from flashi2v_npu_ops.registry import Backend, Case, UnsupportedError, backends, explain, set_backend, use_backend

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "Case",
    "UnsupportedError",
    "apply_rope",
    "attention",
    "attention_part",
    "attention_part_grad",
    "backends",
    "conv3d",
    "device",
    "explain",
    "gated_residual",
    "gelu_tanh",
    "layer_norm_modulate",
    "merge_parts",
    "rms_norm",
    "route_conv3d",
    "set_backend",
    "split_frequencies",
    "testing",
    "use_backend",
]

_REGISTRY = ("Backend", "Case", "UnsupportedError", "backends", "explain", "set_backend", "use_backend")

# A folder has the name of a function. It is imported here, so that no later import puts it in the function's place.
importlib.import_module("flashi2v_npu_ops.backends")
del globals()["backends"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: importing this package imports no torch, and changes nothing."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("device", "testing"):
        return importlib.import_module(f"{__name__}.{name}")
    home = importlib.import_module(f"{__name__}.{'registry' if name in _REGISTRY else 'operators'}")
    return globals().setdefault(name, getattr(home, name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
